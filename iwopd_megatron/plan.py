"""What a recipe needs and costs, from the recipe and config.json alone: `plan(recipe)`.

Roles, their memory against their GPUs, a round by phase, the run's GPU-hours, what another node
buys, and what breaks first. Imports no torch.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

from iwopd_megatron.config import Recipe
from iwopd_megatron.config_cluster import Cluster
from iwopd_megatron.config_models import Layout, Teacher
from iwopd_megatron.errors import RecipeError
from iwopd_megatron.known_models import planning_config
from iwopd_megatron.plan_hardware import GPUS, RATES, Gpu, Rates
from iwopd_megatron.plan_memory import (
    Memory,
    Precision,
    engine,
    kv_bytes,
    scoring,
    training,
)
from iwopd_megatron.plan_model import ModelSize
from iwopd_megatron.plan_round import Generation, Lengths, generate, scored_at
from iwopd_megatron.plan_time import (
    Workload,
    decode_step,
    forward,
    forward_backward,
    optimizer_step,
    pipeline,
)
from iwopd_megatron.preflight import check_layout, describe

DISK = 2e9  # bytes/s a node reads or writes on a shared file system
EAGER_LAYER = 1e-3  # seconds: launches of a layer of the embedded engine, without CUDA graphs


@dataclass(frozen=True)
class Assumptions:
    """What a recipe does not say."""

    mean_prompt: float = 200.0  # competition problems with the chat template
    mean_response: float | None = None  # default: 0.3 of the limit
    spread: float = 0.8  # of the log of a response's length
    packing: float = 0.93  # share of a micro-batch's budget that is filled


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


@dataclass(frozen=True)
class Phase:
    """A part of a round; hidden where another phase runs meanwhile and ends later."""

    name: str
    role: str
    start: float
    seconds: float
    is_hidden: bool = False


@dataclass(frozen=True)
class Planner:
    """One recipe on one cluster. `plan` is the usual way in."""

    recipe: Recipe
    cluster: Cluster
    assumed: Assumptions = Assumptions()
    rates: Rates = RATES

    @cached_property
    def gpu(self) -> Gpu:
        return GPUS[self.cluster.gpu]

    @cached_property
    def student(self) -> ModelSize:
        return ModelSize.of(planning_config(self.recipe.student.hf))

    @cached_property
    def teacher(self) -> ModelSize:
        return ModelSize.of(planning_config(self._teacher.hf))

    @property
    def _teacher(self) -> Teacher:
        if self.recipe.teacher is None:
            raise RecipeError("the recipe has no teacher; the planner plans distillation.")
        return self.recipe.teacher

    @property
    def layout(self) -> Layout:
        return self.recipe.student.parallel

    @property
    def teacher_layout(self) -> Layout:
        service = self._teacher.service
        layout = service.parallel if service else self.layout
        return layout if self.teacher.experts else layout.model_copy(update={"ep": 1, "etp": 1})

    @property
    def teacher_tokens(self) -> int:
        own = self._teacher.service or self._teacher
        return own.microbatch_tokens or self.recipe.train.microbatch_tokens

    @property
    def server_tp(self) -> int:
        servers = self.recipe.rollout.servers
        return servers.tp if servers and self.cluster.rollout else 1

    @property
    def servers(self) -> int:
        return (self.cluster.rollout or self.cluster.trainer) // self.server_tp

    @property
    def data_parallel(self) -> int:
        return self.cluster.trainer // (self.layout.tp * self.layout.pp * self.layout.cp)

    def check(self) -> None:
        """Refuse layouts Megatron would refuse, and roles whose GPUs do not suit their layout."""
        hf, cluster = planning_config(self.recipe.student.hf), self.cluster
        check_layout(self.layout, hf, "student")
        _divides("trainer", cluster.trainer, self.layout.unit, describe(self.layout))
        service = self._teacher.service
        check_layout(self.teacher_layout, planning_config(self._teacher.hf), "teacher")
        if service and not cluster.teacher:
            raise RecipeError("teacher.service needs GPUs; write cluster.teacher=N.")
        if service:
            layout = self.teacher_layout
            _divides("teacher", cluster.teacher, layout.unit, describe(layout))
        if cluster.rollout:
            servers = self.recipe.rollout.servers
            _divides("rollout", cluster.rollout, self.server_tp, f"of a server, tp{self.server_tp}")
            if servers and servers.start and servers.start != self.servers:
                raise RecipeError(
                    f"rollout.servers.start={servers.start} servers of {self.server_tp} GPUs do "
                    f"not make cluster.rollout={cluster.rollout}; write start={self.servers}."
                )

    @cached_property
    def lengths(self) -> Lengths:
        limit = self.recipe.rollout.max_response_tokens
        mean = self.assumed.mean_response or 0.3 * limit
        return Lengths.lognormal(mean, limit, self.assumed.spread, self.prompts)

    @property
    def prompts(self) -> int:
        return self.recipe.train.prompts_per_round

    @property
    def sequence(self) -> float:
        return self.assumed.mean_prompt + self.lengths.mean

    # Memory

    @cached_property
    def roles(self) -> list[Role]:
        roles = [self._trainer_role()]
        if self._teacher.service:
            memory = scoring(self.teacher, self.teacher_layout, self.teacher_tokens)
            knob = "raise teacher.service.parallel.ep or tp"
            roles.append(
                self._role("teacher", self.cluster.teacher, self.teacher_layout, memory, knob)
            )
        if self.cluster.rollout:
            tp, memory = self.server_tp, self._engine_memory()
            knob = "raise rollout.servers.tp"
            role = Role("rollout", self.cluster.rollout, f"{self.servers} servers tp{tp}", memory,
                        self.gpu.memory, knob)  # fmt: skip
            roles.append(role)
        return roles

    def _role(self, name: str, gpus: int, layout: Layout, memory: Memory, knob: str) -> Role:
        copies = gpus // (layout.tp * layout.pp * layout.cp)
        return Role(name, gpus, f"{describe(layout)} dp{copies}", memory, self.gpu.memory, knob)

    def _trainer_role(self) -> Role:
        train, student = self.recipe.train, self.recipe.student
        memory = training(
            self.student,
            self.layout,
            self.cluster.trainer,
            train.microbatch_tokens,
            student.recompute,
            Precision.of(student.dtype),
            train.distributed_optimizer,
        )
        scorers = [] if self._teacher.service or self._teacher.urls else [self._teacher]
        scorers += [self.recipe.base_model] if self.recipe.base_model else []
        for scorer in scorers:
            if not scorer.offload:
                size = ModelSize.of(planning_config(scorer.hf))
                layout = self.layout if size.experts else self.teacher_layout
                weights = scoring(size, layout, train.microbatch_tokens).weights
                memory = replace(memory, scorer=memory.scorer + weights)
        return self._role(
            "trainer", self.cluster.trainer, self.layout, memory, _trainer_knob(self, memory)
        )

    def _engine_memory(self) -> Memory:
        servers = self.recipe.rollout.servers
        fraction = servers.gpu_memory_fraction if servers else 0.85
        return engine(self.student, self.server_tp, self.gpu, fraction)

    @cached_property
    def concurrency(self) -> float:
        """Requests of mean length that a server's KV cache holds, at most `max_running`."""
        servers = self.recipe.rollout.servers
        if not self.cluster.rollout or servers is None:
            return self.recipe.rollout.batch_size
        room = self._engine_memory().kv_cache / kv_bytes(self.student, self.server_tp)
        return max(1.0, min(servers.max_running, room / self.sequence))

    # Time

    def _load(self, size: ModelSize, layout: Layout, tokens: float) -> Workload:
        nodes = self.cluster.gpus_per_node
        return Workload(size, layout, self.gpu, tokens, self.sequence, nodes, rates=self.rates)

    @cached_property
    def generation(self) -> Generation:
        load = self._load(self.student, Layout(), 1)
        eager = 0 if self.cluster.rollout else self.student.layers * EAGER_LAYER

        def step(batch: float, context: float) -> float:
            return decode_step(load, batch, context, self.server_tp) + eager

        requests = self.prompts / self.servers
        return generate(step, self.lengths, self.assumed.mean_prompt, requests, self.concurrency)

    def _passes(self, load: Workload, layout: Layout, gpus: int, seconds: float) -> float:
        """A round's micro-batches through a model of `seconds` each."""
        copies = gpus // (layout.tp * layout.pp * layout.cp)
        count = self.prompts * self.sequence / (copies * load.tokens)
        multiple = layout.pp if layout.vpp > 1 else 1
        whole = max(1, -(-count // multiple)) * multiple
        return pipeline(seconds * min(1, count / whole), layout, whole)

    @cached_property
    def scoring_seconds(self) -> float:
        """Teacher's time for all tokens of a round, without waiting for them."""
        layout, service = self.teacher_layout, self._teacher.service
        gpus = self.cluster.teacher if service else self.cluster.trainer
        load = self._load(self.teacher, layout, self.teacher_tokens * self.assumed.packing)
        return self._passes(load, layout, gpus, forward(load))

    @cached_property
    def phases(self) -> list[Phase]:
        recipe, gpus = self.recipe, self.cluster.trainer
        load = self._load(
            self.student, self.layout, recipe.train.microbatch_tokens * self.assumed.packing
        )
        phases = [Phase("generation", "rollout", 0.0, self.generation.seconds)]
        end = self.generation.seconds
        if self._teacher.service:
            done = scored_at(self.generation, self.assumed.mean_prompt, self.scoring_seconds)
            phases.append(Phase("scoring", "teacher", done - self.scoring_seconds,
                                self.scoring_seconds, done <= end * 1.02))  # fmt: skip
            end = max(end, done)
        else:
            phases.append(Phase("scoring", "trainer", end, self.scoring_seconds))
            end += self.scoring_seconds
        own = [("base scores", recipe.base_model is not None, forward(load))]
        own.append(("old log-probs", recipe.steps_per_round > 1, forward(load)))
        passes = self._passes(
            load, self.layout, gpus, forward_backward(load, recipe.student.recompute)
        )
        after = [(name, self._passes(load, self.layout, gpus, t)) for name, on, t in own if on]
        after += [
            ("forward/backward", passes * recipe.train.epochs),
            ("optimiser", optimizer_step(load, gpus) * recipe.steps_per_round),
            ("weight sync", self._sync_seconds()),
        ]
        for name, seconds in after:
            phases.append(Phase(name, "trainer", end, seconds))
            end += seconds
        return phases

    def _sync_seconds(self) -> float:
        """All weights once. disk: written, then read; else gathered and broadcast over a network
        adapter, both at once.
        """
        size = 2 * self.student.parameters
        if not self.cluster.rollout:
            return size / (self.gpu.nvlink * self.rates.link)
        if self.recipe.rollout.sync == "disk":
            return size / (DISK * self.cluster.nodes("trainer")) + size / DISK
        return 2 * size / (self.gpu.network * self.rates.link)

    @cached_property
    def seconds(self) -> float:
        """Of a round. With max_staleness 1 generation and training run side by side."""
        end = self.phases[-1].start + self.phases[-1].seconds
        if not self.recipe.rollout.max_staleness:
            return end
        sync = self.phases[-1].seconds
        produced = max(
            p.start + p.seconds for p in self.phases if p.name in ("generation", "scoring")
        )
        return max(produced, end - sync - produced) + sync

    @property
    def tokens_per_second(self) -> float:
        """Trained tokens, prompts included, a second and GPU."""
        return self.prompts * self.sequence / self.seconds / self.cluster.gpus

    @property
    def gpu_hours(self) -> float:
        """Of the recipe's rounds with evaluations and checkpoints."""
        recipe, rounds = self.recipe, self.recipe.train.rounds
        total = rounds * self.seconds
        if recipe.data.eval is not None:
            share = recipe.evaluate.problems / self.prompts
            times = 2 + (rounds - 1) // recipe.evaluate.every
            total += times * share * self.generation.seconds
        if recipe.checkpoint.every:
            written = 14 * self.student.parameters / (DISK * self.cluster.nodes("trainer"))
            total += rounds // recipe.checkpoint.every * written
        return total * self.cluster.gpus / 3600

    @property
    def fits(self) -> bool:
        return all(role.fits for role in self.roles)


def _divides(role: str, gpus: int, unit: int, what: str) -> None:
    if gpus % unit:
        raise RecipeError(
            f"cluster.{role}={gpus} is not a multiple of {unit}, what the layout {what} needs; "
            f"write {-(-gpus // unit) * unit}."
        )


def _trainer_knob(planner: Planner, memory: Memory) -> str:
    """The cheapest remedy for the largest part of the memory."""
    parts = {
        "activations": memory.activations + memory.head + memory.communication,
        "states": memory.weights + memory.gradients + memory.optimizer,
        "scorer": memory.scorer,
    }
    largest = max(parts, key=parts.get)
    if largest == "scorer":
        return "give the teacher its own GPUs: teacher.service, cluster.teacher=N"
    if largest == "activations":
        recompute = planner.recipe.student.recompute
        stronger = {"none": "selective", "selective": "full"}.get(recompute)
        return f"student.recompute={stronger}" if stronger else "raise student.parallel.tp or cp"
    axis = "ep" if planner.student.experts and planner.layout.ep < 8 else "pp or cluster.trainer"
    return f"raise {'student.parallel.' if axis == 'ep' else ''}{axis}"


def plan(recipe: Recipe, assumed: Assumptions | None = None) -> Planner:
    """A checked plan of a recipe with a `cluster` section, or without one on its own processes."""
    cluster = recipe.cluster or Cluster(trainer=recipe.world)
    planner = Planner(recipe, cluster, assumed or Assumptions())
    planner.check()
    return planner
