"""Roles of a plan: the memory of one of their GPUs, whether it fits, and the first knob to turn."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from iwopd_megatron.config.models import Frozen, Layout
from iwopd_megatron.hf.known_models import planning_config
from iwopd_megatron.plan.memory import (
    Memory,
    Precision,
    engine,
    kv_bytes,
    scoring,
    training,
)
from iwopd_megatron.plan.model_size import ModelSize
from iwopd_megatron.plan.setup import Setup, copies
from iwopd_megatron.plan.teachers import Scorer


@dataclass(frozen=True)
class Role:
    name: str
    gpus: int
    layout: str
    memory: Memory
    capacity: float  # bytes of one of its GPUs
    knob: str  # the first to turn where it does not fit
    scorers: dict[str, float] = field(default_factory=dict)  # bytes of the embedded models

    @property
    def parts(self) -> dict[str, float]:
        """Bytes by purpose; several embedded models each by its own name."""
        parts: dict[str, float] = {}
        for name, size in vars(self.memory).items():
            parts |= self.scorers if name == "scorer" and self.scorers else {name: size}
        return parts

    @property
    def margin(self) -> float:
        return self.capacity - self.memory.total

    @property
    def fits(self) -> bool:
        return self.margin >= 0 and self.memory.kv_cache >= 0


def roles(setup: Setup) -> list[Role]:
    """Trainer, teacher services and rollout servers, as far as they have GPUs of their own."""
    found = [trainer(setup)]
    found += [teacher(setup, scorer) for scorer in setup.scorers if scorer.key in setup.services]
    if setup.cluster.rollout:
        found.append(rollout(setup))
    return found


def teacher(setup: Setup, scorer: Scorer) -> Role:
    memory = scoring(scorer.size, scorer.layout, scorer.tokens)
    knob = f"raise {scorer.key}.service.parallel.{'ep' if scorer.size.experts else 'tp'}"
    return _role(setup, scorer.key, scorer.gpus, scorer.layout, memory, knob)


def rollout(setup: Setup) -> Role:
    what = f"{setup.servers} servers tp{setup.server_tp}"
    memory = engine_memory(setup)
    knob = "raise rollout.servers.tp"
    return Role("rollout", setup.cluster.rollout, what, memory, setup.gpu.memory, knob)


def _role(setup: Setup, name: str, gpus: int, layout: Layout, memory: Memory, knob: str) -> Role:
    axes = " ".join(f"{axis}{size}" for axis, size in layout if size > 1)
    what = f"{axes} dp{copies(layout, gpus)}".strip()
    return Role(name, gpus, what, memory, setup.gpu.memory, knob)


def trainer(setup: Setup) -> Role:
    """Its memory while it trains, or while an offloaded model scores if that needs more."""
    train, student = setup.recipe.train, setup.recipe.student
    memory = training(
        setup.student,
        setup.layout,
        setup.cluster.trainer,
        train.microbatch_tokens,
        student.recompute,
        Precision.of(student.dtype),
        train.distributed_optimizer,
    )
    if not setup.cluster.rollout:  # the embedded engine gathers the whole student on every rank
        whole = setup.student.parameters * Precision.of(student.dtype).weight
        cache = kv_bytes(setup.student, 1) * setup.sequence * setup.recipe.rollout.batch_size
        memory = replace(memory, kv_cache=whole + cache)
    memory, embedded = max(_moments(setup, memory), key=lambda moment: moment[0].total)
    knob = _trainer_knob(setup, memory, embedded)
    role = _role(setup, "trainer", setup.cluster.trainer, setup.layout, memory, knob)
    return replace(role, scorers=embedded) if len(setup.scorers) > 1 else role


def _moments(setup: Setup, training: Memory) -> list[tuple[Memory, dict[str, float]]]:
    """The trainer's memory, and the weights of embedded models in it by name: in training, and as
    each offloaded model scores.

    Teachers and base student lie side by side. Offloaded ones come one after the other, when the
    student's activations are not there but its states are.
    """
    recipe = setup.recipe
    models: dict[str, Frozen] = {s.key: s.model for s in setup.scorers if not s.model.is_remote}
    models |= {"base": recipe.base_model} if recipe.base_model else {}
    there, away = {}, {}
    for name, model in models.items():
        size, width = ModelSize.of(planning_config(model.hf)), Precision.of(model.dtype).weight
        tokens = model.microbatch_tokens or recipe.train.microbatch_tokens
        needed = scoring(size, setup.layout_of(size), tokens, width)
        there[name] = 0.0 if model.offload else needed.weights
        away |= {name: needed} if model.offload else {}
    found = [(replace(training, scorer=sum(there.values())), there)]
    for name, needed in away.items():
        weights = there | {name: needed.weights}
        scores = replace(
            training,
            activations=needed.activations,
            head=needed.head,
            communication=needed.communication,
            scorer=sum(weights.values()),
        )
        found.append((scores, weights))
    return found


def _trainer_knob(setup: Setup, memory: Memory, embedded: dict[str, float]) -> str:
    """The cheapest remedy for the largest part of the memory."""
    parts = {
        "activations": memory.activations + memory.head + memory.communication,
        "states": memory.weights + memory.gradients + memory.optimizer,
        "scorer": memory.scorer,
        "engine": memory.kv_cache,
    }
    largest = max(parts, key=parts.get)
    if largest == "engine":
        return "rollout.batch_size lower, or rollout.servers on GPUs of their own"
    if largest == "scorer":
        teachers = {key: size for key, size in embedded.items() if key != "base"}
        name = max(teachers, key=teachers.get, default="teacher")
        return f"{name}.service with cluster.teacher=N, GPUs of its own"
    if largest == "activations":
        stronger = {"none": "selective", "selective": "full"}.get(setup.recipe.student.recompute)
        return f"student.recompute={stronger}" if stronger else "raise student.parallel.cp or tp"
    if setup.student.experts and setup.layout.ep < setup.cluster.gpus_per_node:
        return "raise student.parallel.ep"
    return "raise cluster.trainer, student.parallel.tp or pp"


def engine_memory(setup: Setup) -> Memory:
    """One GPU of a rollout server."""
    fraction = setup.recipe.rollout.servers.gpu_memory_fraction
    return engine(setup.student, setup.server_tp, setup.gpu, fraction)


def concurrency(setup: Setup) -> float:
    """Requests of mean length that a server's KV cache holds, at most `max_running`."""
    if not setup.cluster.rollout:
        return setup.recipe.rollout.batch_size
    room = engine_memory(setup).kv_cache / kv_bytes(setup.student, setup.server_tp)
    return max(1.0, min(setup.recipe.rollout.servers.max_running, room / setup.sequence))
