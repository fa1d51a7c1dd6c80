"""What a role's runs say at all layers, of those that ran: calls, bytes over axes, seconds."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from iwopd_megatron.config.stages import stage_layers
from iwopd_megatron.plan.model_size import ModelSize
from iwopd_megatron.plan.phases import sync_seconds
from iwopd_megatron.plan.plan import Plan
from iwopd_megatron.plan.traffic import microbatch_bytes, step_bytes
from iwopd_megatron.rehearsal.job import Job
from iwopd_megatron.rehearsal.place import Place
from iwopd_megatron.rehearsal.push import PUSH
from iwopd_megatron.rehearsal.rank import RankRun
from iwopd_megatron.rehearsal.report import RoleReport
from iwopd_megatron.rehearsal.traffic import STEP, by_axis, communication, volumes


class Small(NamedTuple):
    """A model that stands for all: layers a chunk, and those of them, at the beginning, without
    experts in a model with experts."""

    layers: int
    dense: int


def small_models(job: Job) -> list[Small]:
    """Return the models of whose figures those at all layers follow; none where none do.

    The second differs from the first by a layer, and by what kind of layer that is the third from
    the second. All layers without experts must be in the first chunk, before one with.
    """
    dense = job.hf.first_k_dense_replace
    first = len(stage_layers(job.layout, job.hf.num_hidden_layers)[0][0])
    if max(job.layers_a_chunk) <= 3 or dense >= first:
        return []
    return [Small(2, min(dense, 1)), Small(3, min(dense, 1)), Small(3, 2)][: 2 + (dense > 1)]


@dataclass(frozen=True)
class Figures:
    """Fills a report from the same ranks' runs in models of `small_models`, or of all layers."""

    job: Job
    plan: Plan
    report: RoleReport

    def at_size(self, values: Sequence[float], stage: int) -> float:
        """Return a figure at all layers of a stage, from those of the small models."""
        if len(values) == 1:
            return values[0]
        found = values[0] + (self.job.layers_a_chunk[stage] - 2) * (values[1] - values[0])
        if len(values) == 2:
            return found
        return found + (self.job.hf.first_k_dense_replace - 1) * (values[2] - values[1])

    def kind_at_size(self, kind: str, values: Sequence[float], stage: int) -> float:
        """Return the same of bytes of a kind; buckets of weights do not grow with the layers."""
        return max(values) if kind == PUSH else self.at_size(values, stage)

    def volumes(self, runs: list[RankRun]) -> None:
        """Count calls and bytes by phase, axis and operation."""
        counted = [volumes(run) for run in runs]
        for key in counted[-1]:
            count, size = (
                self.at_size([x.get(key, (0, 0))[i] for x in counted], 0) for i in range(2)
            )
            self.report.volumes.setdefault(key[0], {})[key[1]] = count, size

    def moved(self, runs: list[RankRun]) -> None:
        """Count bytes that are moved over each axis, beside the plan's."""
        job, size_of = self.job, ModelSize.of(self.job.hf)
        phases = STEP if job.trains else (self.report.computing,)
        recompute = getattr(job.model, "recompute", None) if job.trains else None
        planned = {
            axis: job.microbatches * n
            for axis, n in microbatch_bytes(size_of, job.layout, job.tokens, recompute).items()
        }
        planned |= step_bytes(size_of, job.layout, job.world) if job.trains else {}
        rehearsed = [by_axis(run, phases) for run in runs]
        for axis in planned | rehearsed[-1]:
            total = self.at_size([x.get(axis, 0.0) for x in rehearsed], 0)
            self.report.moved[axis] = total, planned.get(axis, 0.0)

    def seconds(self, runs: list[dict[int, RankRun]], ranks: list[Place]) -> None:
        """Find the slowest rank's seconds of a micro-batch, and what they go to."""
        name, rate = self.report.computing, communication(self.plan)
        for place in ranks:
            own = [x[place.rank] for x in runs]
            operations = {
                key: self.at_size([x.seconds[name].get(key, 0.0) for x in own], place.pp)
                for key in own[-1].seconds[name]
            }
            talk = self.at_size([rate(x.calls[name]) for x in own], place.pp)
            costs = Counter(operations | {"communication": talk})
            if costs.total() > self.report.costs.total():
                self.report.costs = costs
                self.report.seconds = costs.total() / self.job.microbatches

    def push(self, runs: list[RankRun]) -> None:
        """Find the first rank's seconds of a push: its stream's, and what it sends to servers."""
        setup, rate = self.plan.setup, communication(self.plan)
        if setup.cluster.rollout and setup.recipe.rollout.sync != "distributed":
            return
        network = setup.gpu.network * setup.rates.link if setup.cluster.rollout else math.inf
        seconds = [
            sum(run.seconds[PUSH].values()) + rate(run.calls[PUSH]) + run.pushed / network
            for run in runs
        ]
        self.report.push_seconds = self.at_size(seconds, 0), sync_seconds(setup)
