"""Roles of a plan: the memory of one of their GPUs, whether it fits, and the first knob to turn.

A role is what has GPUs of its own: the trainer, a teacher's service, the rollout servers.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from iwopd_megatron.config.models import Layout
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
from iwopd_megatron.plan.teachers import PlannedTeacher


@dataclass(frozen=True)
class PlannedRole:
    """A role with its GPUs and the memory of the busiest one."""

    name: str
    gpus: int
    layout: str
    memory: Memory
    capacity: float  # bytes of one of its GPUs
    knob: str  # the first to turn where it does not fit
    embedded: dict[str, float] = field(default_factory=dict)  # bytes of several models that score

    @property
    def parts(self) -> dict[str, float]:
        """Bytes by purpose, as tables show them: several embedded models each by its own name."""
        parts: dict[str, float] = {}
        for name, size in vars(self.memory).items():
            parts |= self.embedded if name == "scorer" and self.embedded else {name: size}
        return parts

    @property
    def margin(self) -> float:
        """Bytes that are left of a GPU, negative where the role does not fit."""
        return self.capacity - self.memory.total

    @property
    def fits(self) -> bool:
        """Whether it fits on its GPUs, an engine's weights in its fraction of them too."""
        return self.margin >= 0 and self.memory.kv_cache >= 0


def roles(setup: Setup) -> list[PlannedRole]:
    """Return the trainer, then teacher services and rollout servers, as far as there are any."""
    found = [trainer_role(setup)]
    found += [teacher_role(setup, one) for one in setup.teachers if one.key in setup.services]
    if setup.cluster.rollout:
        found.append(rollout_role(setup))
    return found


def teacher_role(setup: Setup, teacher: PlannedTeacher) -> PlannedRole:
    """Return a teacher's service: its memory while it scores."""
    hot, topk = setup.assumed.hot, setup.recipe.topk > 0
    memory = scoring(teacher.size, teacher.layout, teacher.tokens, hot=hot, topk=topk)
    knob = f"raise {teacher.key}.service.parallel.{'ep' if teacher.size.experts else 'tp'}"
    return _role(setup, teacher.key, teacher.gpus, teacher.layout, memory, knob)


def rollout_role(setup: Setup) -> PlannedRole:
    """Return the rollout servers: weights and KV cache of one of their GPUs."""
    what = f"{setup.servers} servers tp{setup.server_tp}"
    memory = engine_memory(setup)
    knob = "raise rollout.servers.tp"
    return PlannedRole("rollout", setup.cluster.rollout, what, memory, setup.gpu.memory, knob)


def _role(
    setup: Setup, name: str, gpus: int, layout: Layout, memory: Memory, knob: str
) -> PlannedRole:
    axes = " ".join(f"{axis}{size}" for axis, size in layout.axes.items() if size > 1)
    what = f"{axes} dp{copies(layout, gpus)}".strip()
    return PlannedRole(name, gpus, what, memory, setup.gpu.memory, knob)


def trainer_role(setup: Setup) -> PlannedRole:
    """Return the trainer: its memory while it trains, or while an offloaded model scores if more.

    With the embedded engine, kv_cache = the whole student's weights, which it gathers on every
    rank, + kv_bytes x mean sequence x rollout.batch_size.
    """
    train, student = setup.recipe.train, setup.recipe.student
    memory = training(
        setup.student,
        setup.layout,
        setup.cluster.trainer,
        train.microbatch_tokens,
        student.recompute,
        Precision.of(student.dtype),
        train.distributed_optimizer,
        setup.assumed.hot,
    )
    if not setup.cluster.rollout:
        whole = setup.student.parameters * Precision.of(student.dtype).weight
        cache = kv_bytes(setup.student, 1) * setup.sequence * setup.recipe.rollout.batch_size
        memory = replace(memory, kv_cache=whole + cache)
    memory, embedded = max(_moments(setup, memory), key=lambda moment: moment[0].total)
    knob = _trainer_knob(setup, memory, embedded)
    role = _role(setup, "trainer", setup.cluster.trainer, setup.layout, memory, knob)
    return replace(role, embedded=embedded) if len(setup.teachers) > 1 else role


def _moments(setup: Setup, training: Memory) -> list[tuple[Memory, dict[str, float]]]:
    """Return (memory, bytes of embedded models by name) in training, and as each offloaded scores.

    Weights of embedded teachers and of the base student are there at once. Offloaded ones come one
    after the other, when the student's activations are not there but its states are.
    """
    recipe = setup.recipe
    there: dict[str, float] = {}
    away: dict[str, Memory] = {}
    for name, model in recipe.embedded_scorers.items():
        size, width = ModelSize.of(planning_config(model.hf)), Precision.of(model.dtype).weight
        tokens = model.microbatch_tokens or recipe.train.microbatch_tokens
        topk = recipe.topk > 0 and name != "base"
        needed = scoring(size, setup.layout_of(size), tokens, width, setup.assumed.hot, topk)
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
    """Return the cheapest remedy for the largest part of the memory."""
    parts = {
        "activations": memory.activations + memory.head + memory.communication,
        "states": memory.weights + memory.gradients + memory.optimizer,
        "scorer": memory.scorer,
        "engine": memory.kv_cache,
    }
    largest = max(parts, key=lambda part: parts[part])
    if largest == "engine":
        return "rollout.batch_size lower, or rollout.servers on GPUs of their own"
    if largest == "scorer":
        teachers = {key: size for key, size in embedded.items() if key != "base"}
        name = max(teachers, key=lambda key: teachers[key], default="teacher")
        return f"{name}.service with cluster.teacher=N, GPUs of its own"
    if largest == "activations":
        stronger = {"none": "selective", "selective": "full"}.get(setup.recipe.student.recompute)
        return f"student.recompute={stronger}" if stronger else "raise student.parallel.cp or tp"
    if setup.student.experts and setup.layout.ep < setup.cluster.gpus_per_node:
        return "raise student.parallel.ep"
    return "raise cluster.trainer, student.parallel.tp or pp"


def engine_memory(setup: Setup) -> Memory:
    """Return the memory of one GPU of a rollout server."""
    fraction = setup.recipe.rollout.servers.gpu_memory_fraction
    return engine(setup.student, setup.server_tp, setup.gpu, fraction)


def concurrency(setup: Setup) -> float:
    """Return how many requests a server, or the embedded engine, runs at once.

    Of servers = KV cache / (bytes per token x mean sequence), at least 1 and at most max_running;
    of the embedded engine rollout.batch_size.
    """
    if not setup.cluster.rollout:
        return setup.recipe.rollout.batch_size
    room = engine_memory(setup).kv_cache / kv_bytes(setup.student, setup.server_tp)
    return max(1.0, min(setup.recipe.rollout.servers.max_running, room / setup.sequence))
