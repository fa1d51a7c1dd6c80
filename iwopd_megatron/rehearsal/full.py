"""A recipe's whole run rehearsed at its real size without a GPU: every role, and a round's time."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from iwopd_megatron.config.recipe import Recipe
from iwopd_megatron.plan.phases import Phase, round_seconds, trained
from iwopd_megatron.plan.plan import Plan
from iwopd_megatron.plan.time import forward_backward
from iwopd_megatron.rehearsal.job import jobs
from iwopd_megatron.rehearsal.role import GIB, RoleRehearsal, RoleReport

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
        setup, roles = self.plan.setup, {role.role: role for role in self.roles}
        found = list(self.plan.phases)
        trainer = roles["trainer"].seconds.get("forward/backward")
        load = setup.load(
            setup.student, setup.layout, setup.filled(setup.recipe.train.microbatch_tokens)
        )
        share = load.tokens / setup.recipe.train.microbatch_tokens
        if trainer is None:
            return self.plan.seconds
        ours = dict(trained(setup, load, trainer * share))
        planned = dict(trained(setup, load, forward_backward(load, setup.recipe.student.recompute)))
        late = 0.0
        changed: list[Phase] = []
        for phase in found:
            start, seconds = phase.start + late, phase.seconds
            if phase.name in ours and phase.role == "trainer":
                late += ours[phase.name] - planned[phase.name]
                seconds = ours[phase.name]
            changed.append(Phase(phase.name, phase.role, start, seconds, phase.is_hidden))
        return round_seconds(setup, changed)

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
        "costs_s": {name: round(s, 4) for name, s in role.costs.most_common(LARGEST)},
        "microbatch_s": {name: round(s, 4) for name, s in role.seconds.items()},
    }


def rehearse(
    recipe: Recipe,
    all_layers: bool = False,
    short: bool = False,
    say: Callable[[str], None] = lambda text: None,
) -> Rehearsal:
    """Rehearse a recipe's trainer and teacher services.

    all_layers: no small models in their place; short: a layer a chunk of the slices, no hot ranks.
    RecipeError where the recipe itself is refused.
    """
    start = time.monotonic()
    plan, found = jobs(recipe)
    reports = []
    for job in found:
        say(f"{job.role}: {job.world} ranks")
        reports.append(RoleRehearsal(job, plan, all_layers, short).run())
    return Rehearsal(plan, reports, time.monotonic() - start)
