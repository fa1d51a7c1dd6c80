"""A recipe's whole run rehearsed at its real size without a GPU: every role, and a round's time."""

from __future__ import annotations

import resource
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from iwopd_megatron.config.models import Layout
from iwopd_megatron.config.preflight import check_layout, describe
from iwopd_megatron.config.recipe import Recipe
from iwopd_megatron.plan.phases import phases, round_seconds, trained
from iwopd_megatron.plan.plan import Plan
from iwopd_megatron.plan.time import forward_backward
from iwopd_megatron.rehearsal.job import jobs
from iwopd_megatron.rehearsal.push import PUSH
from iwopd_megatron.rehearsal.report import GIB, RoleReport, on_gpu
from iwopd_megatron.rehearsal.role import RoleRehearsal

LARGEST = 10  # costs


@dataclass(frozen=True)
class Rehearsal:
    """All that was found."""

    plan: Plan
    roles: list[RoleReport]
    seconds: float

    @property
    def findings(self) -> list[str]:
        """What is wrong, role by role; empty where all is well."""
        return [finding for role in self.roles for finding in role.findings]

    @property
    def round_seconds(self) -> float:
        """Seconds of a round with the rehearsed micro-batches in the place of the planned ones."""
        setup, trainer = self.plan.setup, self.roles[0]
        load = setup.load(
            setup.student, setup.layout, setup.filled(setup.recipe.train.microbatch_tokens)
        )
        filled = trainer.seconds * setup.assumed.packing
        found = phases(setup, self.plan.generation, trained(setup, load, filled))
        return round_seconds(setup, found)

    @property
    def planned_microbatch(self) -> float:
        """Seconds that the plan has for a full micro-batch of the trainer."""
        setup, recipe = self.plan.setup, self.plan.setup.recipe
        load = setup.load(setup.student, setup.layout, recipe.train.microbatch_tokens)
        return forward_backward(load, recipe.student.recompute)

    @property
    def peak_rss_mb(self) -> int:
        """The most memory this process took, MB."""
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024

    def as_json(self) -> dict[str, Any]:
        """Return what `--json` prints."""
        return {
            "findings": self.findings,
            "seconds": round(self.seconds, 1),
            "peak_rss_mb": self.peak_rss_mb,
            "roles": {role.role: _role_json(role) for role in self.roles},
            "round_s": {
                "rehearsed": round(self.round_seconds, 1),
                "planned": round(self.plan.seconds, 1),
            },
        }


def _role_json(role: RoleReport) -> dict[str, Any]:
    return {
        "ranks": role.world,
        "rehearsed_ranks": role.rehearsed,
        "tensors": role.slices.tensors,
        "gaps": len(role.slices.gaps),
        "overlaps": len(role.slices.overlaps),
        "peak_gib": round(role.peak / GIB, 2),
        "plan_gib": round(role.planned / GIB, 2),
        "kept_after_backward_gib": round(role.kept / GIB, 3),
        "hot_gib": {f"x{hot:g}": round(size / GIB, 2) for hot, size in role.hot.items()},
        "phases_gib": {
            name: {kind: round(size / GIB, 2) for kind, size in kinds.items()}
            for name, kinds in role.phases.items()
        },
        "loaded_by": [describe(layout) for layout in role.loaded_by],
        "played_calls": role.calls,
        "collectives": {
            phase: {
                what: {"calls": round(count), "bytes": round(size)}
                for what, (count, size) in calls.items()
            }
            for phase, calls in role.volumes.items()
        },
        "moved_gib": {
            axis: {"rehearsed": round(a / GIB, 3), "planned": round(b / GIB, 3)}
            for axis, (a, b) in role.moved.items()
        },
        "push": {
            "gib": round(on_gpu(role.phases.get(PUSH, {})) / GIB, 2),
            "plan_gib": round(role.planned_push / GIB, 2),
            "s": role.push_seconds and round(role.push_seconds[0], 2),
            "plan_s": role.push_seconds and round(role.push_seconds[1], 2),
        },
        "costs_s": {name: round(s, 4) for name, s in role.costs.most_common(LARGEST)},
        "microbatch_s": {role.computing: round(role.seconds, 4)},
    }


def rehearse(
    recipe: Recipe, all_layers: bool = False, short: bool = False, into: Sequence[Layout] = ()
) -> Rehearsal:
    """Rehearse a recipe's trainer and teacher services.

    all_layers: no small models in their place; short: the slices of a small one, no hot ranks;
    into: layouts that shall load the trainer's checkpoint. RecipeError where the recipe itself is
    refused, or a layout of `into` that the student cannot have.
    """
    start = time.monotonic()
    plan, found = jobs(recipe)
    for layout in into:
        check_layout(layout, found[0].hf, "--into")
    reports = [RoleRehearsal(job, plan, all_layers, short, into).run() for job in found]
    return Rehearsal(plan, reports, time.monotonic() - start)
