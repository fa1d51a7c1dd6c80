"""A recipe on a cluster as the planner sees it: sizes, layouts, GPUs, and what is refused."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from iwopd_megatron.config import Recipe
from iwopd_megatron.config_cluster import Cluster
from iwopd_megatron.config_models import Layout, Teacher
from iwopd_megatron.errors import RecipeError
from iwopd_megatron.known_models import planning_config
from iwopd_megatron.plan_hardware import GPUS, RATES, Gpu, Rates
from iwopd_megatron.plan_model import ModelSize
from iwopd_megatron.plan_round import Lengths
from iwopd_megatron.plan_time import Workload
from iwopd_megatron.preflight import check_layout, describe


@dataclass(frozen=True)
class Assumptions:
    """What a recipe does not say."""

    mean_prompt: float = 200.0  # competition problems with the chat template
    mean_response: float | None = None  # default: 0.3 of the limit
    spread: float = 0.8  # of the log of a response's length
    packing: float = 0.93  # share of a micro-batch's budget that is filled


@dataclass(frozen=True)
class Setup:
    """One recipe on one cluster."""

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
        return ModelSize.of(planning_config(self.scorer.hf))

    @cached_property
    def scorer(self) -> Teacher:
        teachers = list(self.recipe.named_teachers.values())
        if len(teachers) != 1:
            raise RecipeError(
                f"the recipe has {len(teachers)} teachers; the planner plans distillation from one."
            )
        return teachers[0]

    @property
    def layout(self) -> Layout:
        return self.recipe.student.parallel

    def layout_of(self, size: ModelSize) -> Layout:
        """The student's layout for a model beside it: a dense one is not cut along expert axes."""
        dense = self.layout.model_copy(update={"ep": 1, "etp": 1})
        return self.layout if size.experts else dense

    @property
    def teacher_layout(self) -> Layout:
        service = self.scorer.service
        return service.parallel if service else self.layout_of(self.teacher)

    @property
    def teacher_tokens(self) -> int:
        own = self.scorer.service or self.scorer
        return own.microbatch_tokens or self.recipe.train.microbatch_tokens

    def filled(self, budget: int) -> float:
        """Tokens of a micro-batch as the packer fills it."""
        return budget * self.assumed.packing

    @property
    def server_tp(self) -> int:
        return self.recipe.rollout.servers.tp if self.cluster.rollout else 1

    @property
    def servers(self) -> int:
        return (self.cluster.rollout or self.cluster.trainer) // self.server_tp

    @property
    def data_parallel(self) -> int:
        return copies(self.layout, self.cluster.trainer)

    def check(self) -> None:
        """Refuse layouts Megatron would refuse, and roles whose GPUs do not suit their layout."""
        hf, cluster = planning_config(self.recipe.student.hf), self.cluster
        for role in cluster.uneven_roles:
            raise RecipeError(
                f"cluster.{role}={getattr(cluster, role)} does not fill whole nodes of "
                f"{cluster.gpus_per_node}; write a multiple, or less than one node."
            )
        check_layout(self.layout, hf, "student")
        _divides("trainer", cluster.trainer, self.layout.unit, describe(self.layout))
        service = self.scorer.service
        check_layout(self.teacher_layout, planning_config(self.scorer.hf), "teacher")
        if service and not cluster.teacher:
            raise RecipeError("teacher.service needs GPUs; write cluster.teacher=N.")
        if service:
            layout = self.teacher_layout
            _divides("teacher", cluster.teacher, layout.unit, describe(layout))
            if service.world != cluster.teacher:
                raise RecipeError(
                    f"teacher.service.processes={service.world} differs from "
                    f"cluster.teacher={cluster.teacher}; write processes={cluster.teacher}."
                )
        if cluster.rollout:
            given = self.recipe.rollout.servers.start
            _divides("rollout", cluster.rollout, self.server_tp, f"of a server, tp{self.server_tp}")
            if given and given != self.servers:
                raise RecipeError(
                    f"rollout.servers.start={given} servers of {self.server_tp} GPUs do "
                    f"not make cluster.rollout={cluster.rollout}; write start={self.servers}."
                )

    def on(self, cluster: Cluster) -> Recipe:
        """The recipe on other GPUs: as many servers and teacher processes as they hold."""
        rollout, teacher = self.recipe.rollout, self.recipe.teacher
        if cluster.rollout:
            start = cluster.rollout // rollout.servers.tp
            servers = rollout.servers.model_copy(update={"start": start})
            rollout = rollout.model_copy(update={"servers": servers})
        if teacher and teacher.service:
            service = teacher.service.model_copy(update={"processes": cluster.teacher})
            teacher = teacher.model_copy(update={"service": service})
        update = {"rollout": rollout, "teacher": teacher, "cluster": cluster}
        return self.recipe.model_copy(update=update)

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

    def load(self, size: ModelSize, layout: Layout, tokens: float) -> Workload:
        """A model on this cluster's GPUs, micro-batches of `tokens`."""
        nodes = self.cluster.gpus_per_node
        return Workload(size, layout, self.gpu, tokens, self.sequence, nodes, rates=self.rates)


def copies(layout: Layout, gpus: int) -> int:
    """Data-parallel copies of a layout on so many GPUs."""
    return gpus // (layout.tp * layout.pp * layout.cp)


def _divides(role: str, gpus: int, unit: int, what: str) -> None:
    if gpus % unit:
        raise RecipeError(
            f"cluster.{role}={gpus} is not a multiple of {unit}, what the layout {what} needs; "
            f"write {-(-gpus // unit) * unit}."
        )
