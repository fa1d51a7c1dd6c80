"""Roles of a plan: the memory of one of their GPUs, whether it fits, and the first knob to turn."""

from __future__ import annotations

from dataclasses import dataclass, replace

from iwopd_megatron.config_models import Layout
from iwopd_megatron.known_models import planning_config
from iwopd_megatron.plan_memory import (
    Memory,
    Precision,
    engine,
    kv_bytes,
    scoring,
    training,
)
from iwopd_megatron.plan_model import ModelSize
from iwopd_megatron.plan_setup import Setup, copies


@dataclass(frozen=True)
class Role:
    name: str
    gpus: int
    layout: str
    memory: Memory
    capacity: float  # bytes of one of its GPUs
    knob: str  # the first to turn where it does not fit

    @property
    def margin(self) -> float:
        return self.capacity - self.memory.total

    @property
    def fits(self) -> bool:
        return self.margin >= 0 and self.memory.kv_cache >= 0


def roles(setup: Setup) -> list[Role]:
    """Trainer, teacher service and rollout servers, as far as they have GPUs of their own."""
    found = [trainer(setup)]
    if setup.scorer.service:
        found.append(teacher(setup))
    if setup.cluster.rollout:
        found.append(rollout(setup))
    return found


def teacher(setup: Setup) -> Role:
    memory = scoring(setup.teacher, setup.teacher_layout, setup.teacher_tokens)
    knob = f"raise teacher.service.parallel.{'ep' if setup.teacher.experts else 'tp'}"
    return _role(setup, "teacher", setup.cluster.teacher, setup.teacher_layout, memory, knob)


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
    train, student, scorer = setup.recipe.train, setup.recipe.student, setup.scorer
    memory = training(
        setup.student,
        setup.layout,
        setup.cluster.trainer,
        train.microbatch_tokens,
        student.recompute,
        Precision.of(student.dtype),
        train.distributed_optimizer,
    )
    embedded = [] if scorer.is_remote else [scorer]
    embedded += [setup.recipe.base_model] if setup.recipe.base_model else []
    for model in embedded:
        if not model.offload:
            size = ModelSize.of(planning_config(model.hf))
            layout = setup.layout_of(size)
            width = Precision.of(model.dtype).weight
            weights = scoring(size, layout, train.microbatch_tokens, width).weights
            memory = replace(memory, scorer=memory.scorer + weights)
    if not setup.cluster.rollout:  # the embedded engine gathers the whole student on every rank
        whole = setup.student.parameters * Precision.of(student.dtype).weight
        cache = kv_bytes(setup.student, 1) * setup.sequence * setup.recipe.rollout.batch_size
        memory = replace(memory, kv_cache=whole + cache)
    knob = _trainer_knob(setup, memory)
    return _role(setup, "trainer", setup.cluster.trainer, setup.layout, memory, knob)


def _trainer_knob(setup: Setup, memory: Memory) -> str:
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
        return "teacher.service with cluster.teacher=N, GPUs of its own"
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
