"""Seconds of a round by phase: what runs when, on which role, and what is hidden behind it.

Seconds of a phase = seconds of a micro-batch or a decode step (time.py) x how many of them a round
has x `Rates.system`, which host work, uneven batches and waiting add.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from iwopd_megatron.config.models import Layout
from iwopd_megatron.plan.generation import Generation, Lengths, generate, scored_at
from iwopd_megatron.plan.roles import concurrency
from iwopd_megatron.plan.setup import Setup, copies
from iwopd_megatron.plan.teachers import PlannedTeacher
from iwopd_megatron.plan.time import (
    Workload,
    decode_step,
    forward,
    forward_backward,
    optimizer_step,
    pipeline,
)

DISK = 2e9  # bytes/s a node reads or writes on a shared file system
EAGER_LAYER = 1e-3  # seconds: launches of a layer of the embedded engine, without CUDA graphs


@dataclass(frozen=True)
class Phase:
    """A part of a round, in seconds; hidden where it ends no later than generation, or just after.

    role: who works on it, 'rollout', 'trainer' or the key of a teacher's service.
    """

    name: str
    role: str
    start: float
    seconds: float
    is_hidden: bool = False


def generation(setup: Setup) -> Generation:
    """Return when the responses of one server end; all servers have prompts / servers of them.

    The embedded engine, which has no CUDA graphs, takes EAGER_LAYER a layer more.
    """
    load = setup.load(setup.student, Layout(), 1)
    eager = 0 if setup.cluster.rollout else setup.student.layers * EAGER_LAYER
    requests, prompt = setup.prompts / setup.servers, setup.assumed.mean_prompt
    room = concurrency(setup)
    return _written(load, setup.server_tp, eager, setup.lengths, prompt, requests, room)


@lru_cache(maxsize=1024)  # a search asks the same of many splits
def _written(
    load: Workload,
    tp: int,
    eager: float,
    lengths: Lengths,
    prompt: float,
    requests: float,
    room: float,
) -> Generation:
    def step(batch: float, context: float) -> float:
        return (decode_step(load, batch, context, tp) + eager) * load.rates.system

    return generate(step, lengths, prompt, requests, room)


def scoring_seconds(setup: Setup, teacher: PlannedTeacher) -> float:
    """Return a teacher's seconds for its share of a round's tokens, without waiting for them.

    = `passes` of forward micro-batches. 0 for servers given by their urls, which are not planned.
    """
    if teacher.model.urls or not teacher.share:
        return 0.0
    load = setup.load(teacher.size, teacher.layout, setup.filled(teacher.tokens))
    return passes(setup, load, teacher.gpus, forward(load), teacher.share)


def passes(setup: Setup, load: Workload, gpus: int, seconds: float, share: float = 1.0) -> float:
    """Return seconds of a share of a round's tokens through a model on so many GPUs.

    Micro-batches of a copy = share x prompts x mean sequence / (copies x tokens of one), at least
    longest sequence / tokens of one; rounded up to whole ones (interleaved: to multiples of pp),
    which take `seconds` on a stage if full. Then `pipeline` x `Rates.system`.
    """
    layout = load.layout
    count = share * setup.prompts * setup.sequence / (copies(layout, gpus) * load.tokens)
    longest = setup.assumed.mean_prompt + setup.lengths.values[-1]
    count = max(count, longest / load.tokens)  # no sequence is cut over copies
    multiple = layout.pp if layout.vpp > 1 else 1
    whole = max(1, -(-count // multiple)) * multiple
    return pipeline(seconds * min(1, count / whole), layout, whole) * setup.rates.system


def phases(
    setup: Setup, written: Generation, training: list[tuple[str, float]] | None = None
) -> list[Phase]:
    """Return the phases: generation, scoring, then the trainer's others, which follow one another.

    Services score their samples side by side as these end, embedded teachers theirs one after the
    other once all are written. Fine-tuning has the trainer's only. training: what the trainer does
    in the end, if not as `training_phases` has it.
    """
    found, end = [], 0.0
    if setup.recipe.is_distilling:
        found.append(Phase("generation", "rollout", 0.0, written.seconds))
        end = written.seconds
    served = end
    for teacher in setup.teachers:
        name = "scoring" if len(setup.teachers) == 1 else f"scoring {teacher.key}"
        scored = scoring_seconds(setup, teacher)
        if teacher.model.is_remote:
            done = scored_at(written, setup.assumed.mean_prompt, scored)
            is_hidden = done <= 1.02 * written.seconds
            found.append(Phase(name, teacher.key, done - scored, scored, is_hidden))
            served = max(served, done)
        else:
            found.append(Phase(name, "trainer", end, scored))
            end += scored
    end = max(end, served)
    for name, seconds in training_phases(setup) if training is None else training:
        found.append(Phase(name, "trainer", end, seconds))
        end += seconds
    return found


def training_phases(setup: Setup) -> list[tuple[str, float]]:
    """Return (phase, seconds) of what the trainer does once all responses are scored."""
    load = setup.load(
        setup.student, setup.layout, setup.filled(setup.recipe.train.microbatch_tokens)
    )
    return trained(setup, load, forward_backward(load, setup.recipe.student.recompute))


def trained(setup: Setup, load: Workload, stage: float) -> list[tuple[str, float]]:
    """Return the same for a given workload; stage: seconds of a micro-batch forward and backward.

    base scores (ExOPD) and old log-probs (more than one optimiser step a round) = `passes` of
    forward micro-batches; forward/backward = epochs x `passes` of `stage`; optimiser = steps a
    round x `optimizer_step`; weight sync = `sync_seconds`.
    """
    recipe, gpus = setup.recipe, setup.cluster.trainer
    names = ["base scores"] * bool(recipe.base_model)
    names += ["old log-probs"] * (recipe.is_distilling and recipe.steps_per_round > 1)
    again = passes(setup, load, gpus, forward(load)) if names else 0.0
    both = passes(setup, load, gpus, stage)
    return [
        *((name, again) for name in names),
        ("forward/backward", both * recipe.train.epochs),
        ("optimiser", optimizer_step(load, gpus) * recipe.steps_per_round),
        ("weight sync", sync_seconds(setup)),
    ]


def sync_seconds(setup: Setup) -> float:
    """Return seconds of giving the engine new weights, B = 2 bytes x parameters.

    Embedded engine = B / NVLink. Servers by disk = B / (DISK x the trainer's nodes) + B / DISK:
    written by all nodes, then read; else 2 B / network: gathered, and broadcast over one adapter.
    """
    size, gpu = 2 * setup.student.parameters, setup.gpu
    if not setup.cluster.rollout:
        return size / (gpu.nvlink * setup.rates.link)
    if setup.recipe.rollout.sync == "disk":
        return size / (DISK * setup.cluster.nodes_of("trainer")) + size / DISK
    return 2 * size / (gpu.network * setup.rates.link)


def round_seconds(setup: Setup, found: list[Phase]) -> float:
    """Return seconds from one round to the next = the end of its last phase, the weight sync.

    With max_staleness 1 the next round is generated and scored while this one is trained on: the
    longer of both + weight sync.
    """
    last = found[-1]
    end = last.start + last.seconds
    if not setup.recipe.rollout.max_staleness:
        return end
    ready = max(p.start + p.seconds for p in found if p.role != "trainer")
    begun = min(ready, *(p.start for p in found if p.role == "trainer"))
    return max(ready, last.start - begun) + last.seconds
