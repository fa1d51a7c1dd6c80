"""A recipe on a cluster as the planner sees it: assumptions, sizes, layouts, GPUs, refusals."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from iwopd_megatron.config.cluster import Cluster
from iwopd_megatron.config.models import Layout
from iwopd_megatron.config.preflight import check_layout, check_service_sizes, describe
from iwopd_megatron.config.recipe import Recipe
from iwopd_megatron.errors import RecipeError
from iwopd_megatron.hf.known_models import planning_config
from iwopd_megatron.plan.generation import Lengths
from iwopd_megatron.plan.hardware import GPUS, RATES, Gpu, Rates
from iwopd_megatron.plan.model_size import ModelSize
from iwopd_megatron.plan.teachers import PlannedTeacher, sample_shares
from iwopd_megatron.plan.time import Workload


@dataclass(frozen=True)
class Assumptions:
    """What a recipe does not say: lengths in tokens, fullness of micro-batches, load of experts."""

    mean_prompt: float = 200.0  # competition problems with the chat template
    mean_response: float | None = None  # default: 0.3 of the limit
    spread: float = 0.8  # of the log of a response's length
    packing: float = 0.93  # share of a micro-batch's budget that is filled
    hot: float = 1.0  # tokens of the busiest expert rank over the mean, in every layer


@dataclass(frozen=True)
class Setup:
    """A recipe, the cluster it is planned on, and what is assumed of both."""

    recipe: Recipe  # with `cluster` as its own
    cluster: Cluster
    assumed: Assumptions = Assumptions()
    rates: Rates = RATES
    said: tuple[str, ...] = ()  # GPUs that the recipe did not give

    @classmethod
    def of(
        cls, recipe: Recipe, cluster: Cluster, assumed: Assumptions, said: tuple[str, ...] = ()
    ) -> Setup:
        """Return a recipe on `cluster`, whatever its own is."""
        recipe = recipe.model_copy(update={"cluster": cluster})
        return cls(recipe, cluster, assumed, said=said)

    @cached_property
    def gpu(self) -> Gpu:
        """Peaks of the cluster's GPUs."""
        return GPUS[self.cluster.gpu]

    @cached_property
    def student(self) -> ModelSize:
        """Sizes of the student."""
        return ModelSize.of(planning_config(self.recipe.student.hf))

    @cached_property
    def teachers(self) -> list[PlannedTeacher]:
        """The recipe's teachers, embedded, in services or at urls."""
        shares = sample_shares(self.recipe)
        return [self._teacher(key, shares[key]) for key in self.recipe.named_teachers]

    def teacher(self, key: str) -> PlannedTeacher:
        """Return the teacher of this key, 'teacher' or 'teachers.SOURCE'."""
        return next(teacher for teacher in self.teachers if teacher.key == key)

    def _teacher(self, key: str, share: float) -> PlannedTeacher:
        model, train = self.recipe.named_teachers[key], self.recipe.train
        size, service = ModelSize.of(planning_config(model.hf)), self.recipe.services.get(key)
        layout = service.parallel if service else self.layout_of(size)
        gpus = self.services[key] if service else 0 if model.urls else self.cluster.trainer
        tokens = (service or model).microbatch_tokens or train.microbatch_tokens
        return PlannedTeacher(key, model, size, layout, gpus, tokens, share)

    @cached_property
    def services(self) -> dict[str, int]:
        """GPUs of every teacher service, by the teacher's key."""
        return self.recipe.service_processes

    @cached_property
    def gpus(self) -> dict[str, int]:
        """GPUs of every role that has any: trainer, each teacher service, rollout servers."""
        rollout = {"rollout": self.cluster.rollout} if self.cluster.rollout else {}
        return {"trainer": self.cluster.trainer} | self.services | rollout

    @property
    def layout(self) -> Layout:
        """The student's layout."""
        return self.recipe.student.parallel

    def layout_of(self, size: ModelSize) -> Layout:
        """Return the layout of a model embedded beside the student.

        It is the student's; a dense model is not cut along its expert axes.
        """
        return self.layout if size.experts else self.layout.without_experts

    def filled(self, budget: int) -> float:
        """Return tokens of a micro-batch with this budget as the packer fills it."""
        return budget * self.assumed.packing

    @property
    def server_tp(self) -> int:
        """GPUs of one rollout server; 1 for the embedded engine."""
        return self.recipe.rollout.servers.tp if self.cluster.rollout else 1

    @property
    def servers(self) -> int:
        """Rollout servers; with the embedded engine the trainer's processes."""
        return (self.cluster.rollout or self.cluster.trainer) // self.server_tp

    @property
    def data_parallel(self) -> int:
        """Data-parallel copies of the student."""
        return copies(self.layout, self.cluster.trainer)

    def check(self) -> None:
        """Refuse layouts Megatron would refuse, and roles whose GPUs do not suit their layout.

        Raises RecipeError.
        """
        hf, cluster = planning_config(self.recipe.student.hf), self.cluster
        self._check_nodes()
        check_layout(self.layout, hf, "student")
        _divides("trainer", cluster.trainer, self.layout.unit, describe(self.layout))
        for teacher in self.teachers:
            if not teacher.model.urls:
                check_layout(teacher.layout, planning_config(teacher.model.hf), teacher.key)
        check_service_sizes(self.recipe)
        if cluster.rollout:
            given = self.recipe.rollout.servers.start
            _divides("rollout", cluster.rollout, self.server_tp, f"of a server, tp{self.server_tp}")
            if given and given != self.servers:
                raise RecipeError(
                    f"rollout.servers.start={given} servers of {self.server_tp} GPUs do "
                    f"not make cluster.rollout={cluster.rollout}; write start={self.servers}."
                )

    def _check_nodes(self) -> None:
        """Refuse roles larger than a node that do not fill their last one."""
        cluster, sizes = self.cluster, {}
        if len(self.recipe.services) > 1:
            sizes = {f"{key}.service.processes": n for key, n in self.services.items()}
        else:
            sizes["cluster.teacher"] = cluster.teacher
        sizes |= {"cluster.trainer": cluster.trainer, "cluster.rollout": cluster.rollout}
        for key, gpus in sizes.items():
            if gpus > cluster.gpus_per_node and gpus % cluster.gpus_per_node:
                raise RecipeError(
                    f"{key}={gpus} does not fill whole nodes of "
                    f"{cluster.gpus_per_node}; write a multiple, or less than one node."
                )

    def on(self, gpus: dict[str, int]) -> Setup:
        """Return the same with other GPUs by role: more or fewer servers and processes."""
        services = {key: gpus[key] for key in self.services}
        changes: dict[str, Any] = {f"{key}.service.processes": n for key, n in services.items()}
        if self.cluster.rollout:
            changes["rollout.servers.start"] = gpus["rollout"] // self.recipe.rollout.servers.tp
        shares = {"teacher": sum(services.values()), "rollout": gpus.get("rollout", 0)}
        cluster = self.cluster.model_copy(update=shares | {"trainer": gpus["trainer"]})
        recipe = self.changed(changes).recipe.model_copy(update={"cluster": cluster})
        return replace(self, recipe=recipe, cluster=cluster)

    def divided(self, cluster: Cluster) -> dict[str, int]:
        """Return a cluster's GPUs by role; teacher services keep about their proportion.

        Those get whole nodes where together they have more than one; one may be left with none.
        """
        unit = cluster.gpus_per_node if cluster.teacher > cluster.gpus_per_node else 1
        parts, now = cluster.teacher // unit, list(self.services.values())
        ends = [round(parts * sum(now[: i + 1]) / sum(now)) * unit for i in range(len(now))]
        services = {
            key: end - begin
            for key, begin, end in zip(self.services, [0, *ends], ends, strict=False)
        }
        return {"trainer": cluster.trainer} | services | {"rollout": cluster.rollout}

    def changed(self, changes: dict[str, Any]) -> Setup:
        """Return the same with other values at the recipe's dotted keys, none of its cluster."""
        recipe = self.recipe
        for key, value in changes.items():
            recipe = _replaced(recipe, key.split("."), value)
        return replace(self, recipe=recipe)

    @cached_property
    def lengths(self) -> Lengths:
        """Response lengths of a round; their mean is assumed unless given."""
        limit = self.recipe.rollout.max_response_tokens
        mean = self.assumed.mean_response or 0.3 * limit
        return Lengths.lognormal(mean, limit, self.assumed.spread, self.prompts)

    @property
    def prompts(self) -> int:
        """Prompts of a round, one response each."""
        return self.recipe.train.prompts_per_round

    @cached_property
    def sequence(self) -> float:
        """Tokens of a prompt with its response, on average."""
        return self.assumed.mean_prompt + self.lengths.mean

    def load(self, size: ModelSize, layout: Layout, tokens: float) -> Workload:
        """Return a model on this cluster's GPUs with micro-batches of `tokens`."""
        nodes = self.cluster.gpus_per_node
        return Workload(size, layout, self.gpu, tokens, self.sequence, nodes, rates=self.rates)


def _replaced(section: Any, path: list[str], value: Any) -> Any:
    """Return a section with the value at a path, in copies: sections are immutable."""
    if not path:
        return value
    name, *rest = path
    if isinstance(section, dict):
        return section | {name: _replaced(section[name], rest, value)}
    return section.model_copy(update={name: _replaced(getattr(section, name), rest, value)})


def copies(layout: Layout, gpus: int) -> int:
    """Return data-parallel copies of a layout on so many GPUs = gpus / (tp pp cp)."""
    return gpus // (layout.tp * layout.pp * layout.cp)


def _divides(role: str, gpus: int, unit: int, what: str) -> None:
    if gpus % unit:
        raise RecipeError(
            f"cluster.{role}={gpus} is not a multiple of {unit}, what the layout {what} needs; "
            f"write {-(-gpus // unit) * unit}."
        )
