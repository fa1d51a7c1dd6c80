"""A recipe on a cluster as the planner sees it: sizes, layouts, GPUs, and what is refused."""

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
from iwopd_megatron.plan.hardware import GPUS, RATES, Gpu, Rates
from iwopd_megatron.plan.model import ModelSize
from iwopd_megatron.plan.round import Lengths
from iwopd_megatron.plan.teachers import Scorer, sample_shares
from iwopd_megatron.plan.time import Workload


@dataclass(frozen=True)
class Assumptions:
    """What a recipe does not say."""

    mean_prompt: float = 200.0  # competition problems with the chat template
    mean_response: float | None = None  # default: 0.3 of the limit
    spread: float = 0.8  # of the log of a response's length
    packing: float = 0.93  # share of a micro-batch's budget that is filled


@dataclass(frozen=True)
class Setup:
    """One recipe, which has a cluster, and what is assumed of it."""

    recipe: Recipe
    assumed: Assumptions = Assumptions()
    rates: Rates = RATES
    said: tuple[str, ...] = ()  # GPUs that the recipe did not give

    @property
    def cluster(self) -> Cluster:
        return self.recipe.cluster

    @cached_property
    def gpu(self) -> Gpu:
        return GPUS[self.cluster.gpu]

    @cached_property
    def student(self) -> ModelSize:
        return ModelSize.of(planning_config(self.recipe.student.hf))

    @cached_property
    def scorers(self) -> list[Scorer]:
        """The recipe's teachers."""
        shares = sample_shares(self.recipe)
        return [self._scorer(key, shares[key]) for key in self.recipe.named_teachers]

    def scorer(self, key: str) -> Scorer:
        return next(scorer for scorer in self.scorers if scorer.key == key)

    def _scorer(self, key: str, share: float) -> Scorer:
        model, train = self.recipe.named_teachers[key], self.recipe.train
        size, service = ModelSize.of(planning_config(model.hf)), self.recipe.services.get(key)
        layout = service.parallel if service else self.layout_of(size)
        gpus = self.services[key] if service else 0 if model.urls else self.cluster.trainer
        tokens = (service or model).microbatch_tokens or train.microbatch_tokens
        return Scorer(key, model, size, layout, gpus, tokens, share)

    @cached_property
    def services(self) -> dict[str, int]:
        """GPUs of every teacher service."""
        return self.recipe.service_processes

    @cached_property
    def gpus(self) -> dict[str, int]:
        """Of every role that has any: the trainer, each teacher service, the rollout servers."""
        rollout = {"rollout": self.cluster.rollout} if self.cluster.rollout else {}
        return {"trainer": self.cluster.trainer} | self.services | rollout

    @property
    def layout(self) -> Layout:
        return self.recipe.student.parallel

    def layout_of(self, size: ModelSize) -> Layout:
        """The student's layout for a model beside it: a dense one is not cut along expert axes."""
        dense = self.layout.model_copy(update={"ep": 1, "etp": 1})
        return self.layout if size.experts else dense

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
        self._check_nodes()
        check_layout(self.layout, hf, "student")
        _divides("trainer", cluster.trainer, self.layout.unit, describe(self.layout))
        for scorer in self.scorers:
            if not scorer.model.urls:
                check_layout(scorer.layout, planning_config(scorer.model.hf), scorer.key)
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
        """The same with other GPUs of `gpus`' roles: more or fewer servers and processes."""
        services = {key: gpus[key] for key in self.services}
        changes: dict[str, Any] = {f"{key}.service.processes": n for key, n in services.items()}
        if self.cluster.rollout:
            changes["rollout.servers.start"] = gpus["rollout"] // self.recipe.rollout.servers.tp
        shares = {"teacher": sum(services.values()), "rollout": gpus.get("rollout", 0)}
        cluster = self.cluster.model_copy(update=shares | {"trainer": gpus["trainer"]})
        return self.changed(changes | {"cluster": cluster})

    def divided(self, cluster: Cluster) -> dict[str, int]:
        """A cluster's GPUs by role; teacher services about keep their proportion.

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
        """With other values at the recipe's dotted keys."""
        recipe = self.recipe
        for key, value in changes.items():
            recipe = _replaced(recipe, key.split("."), value)
        return replace(self, recipe=recipe)

    @cached_property
    def lengths(self) -> Lengths:
        limit = self.recipe.rollout.max_response_tokens
        mean = self.assumed.mean_response or 0.3 * limit
        return Lengths.lognormal(mean, limit, self.assumed.spread, self.prompts)

    @property
    def prompts(self) -> int:
        return self.recipe.train.prompts_per_round

    @cached_property
    def sequence(self) -> float:
        return self.assumed.mean_prompt + self.lengths.mean

    def load(self, size: ModelSize, layout: Layout, tokens: float) -> Workload:
        """A model on this cluster's GPUs, micro-batches of `tokens`."""
        nodes = self.cluster.gpus_per_node
        return Workload(size, layout, self.gpu, tokens, self.sequence, nodes, rates=self.rates)


def _replaced(section: Any, path: list[str], value: Any) -> Any:
    """A section with the value at a path; sections are immutable, so those on it are copied."""
    if not path:
        return value
    name, *rest = path
    if isinstance(section, dict):
        return section | {name: _replaced(section[name], rest, value)}
    return section.model_copy(update={name: _replaced(getattr(section, name), rest, value)})


def copies(layout: Layout, gpus: int) -> int:
    """Data-parallel copies of a layout on so many GPUs."""
    return gpus // (layout.tp * layout.pp * layout.cp)


def _divides(role: str, gpus: int, unit: int, what: str) -> None:
    if gpus % unit:
        raise RecipeError(
            f"cluster.{role}={gpus} is not a multiple of {unit}, what the layout {what} needs; "
            f"write {-(-gpus // unit) * unit}."
        )
