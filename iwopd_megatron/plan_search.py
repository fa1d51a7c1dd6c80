"""Other layouts and splits of the GPUs between roles, best first.

Each role's best layout is found for each number of GPUs on its own: least time among those that
fit. Then the splits are compared by the round's time, since roles run at once and wait for another.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

from iwopd_megatron.config_cluster import Cluster
from iwopd_megatron.config_models import Layout
from iwopd_megatron.errors import RecipeError
from iwopd_megatron.known_models import planning_config
from iwopd_megatron.plan import Plan
from iwopd_megatron.plan_phases import generation, scoring_seconds, training_phases
from iwopd_megatron.plan_roles import Role, rollout, teacher, trainer
from iwopd_megatron.plan_setup import Setup
from iwopd_megatron.plan_teachers import Scorer
from iwopd_megatron.preflight import check_layout, num_experts

MARGIN = 0.05  # of a GPU's memory that a proposal leaves free
DEGREES = (1, 2, 4, 8, 16, 32, 64)


def search(plan: Plan, gpus: int | None = None, layouts: bool = True) -> list[Plan]:
    """Plans on `gpus` (default: as many), fastest round first; those that fit come before others.

    layouts: also other layouts, recomputation and server sizes; else only the split changes.
    """
    setup, total = plan.setup, gpus or plan.gpus
    trainers, teachers, servers = {}, {}, {}
    found = []
    for cluster in splits(setup.cluster, total):
        gpus, changes = setup.divided(cluster), {}
        if not all(gpus[key] for key in setup.services):
            continue
        base = setup.on(gpus)
        if layouts:
            for kept, count, best in (
                (trainers, cluster.trainer, _best_trainer),
                (teachers, cluster.teacher, _best_teachers),
                (servers, cluster.rollout, _best_servers),
            ):
                if count not in kept:
                    kept[count] = best(base) if count else {}
            if None in (trainers[cluster.trainer], teachers[cluster.teacher]):
                continue
            if servers[cluster.rollout] is None:
                continue
            changes = trainers[cluster.trainer] | teachers[cluster.teacher]
            changes |= servers[cluster.rollout]
        try:
            candidate = base.changed(changes)
            candidate.check()
        except RecipeError:
            continue
        found.append(Plan(candidate))
    return sorted(found, key=lambda plan: (not plan.fits, plan.seconds))


def splits(cluster: Cluster, total: int) -> Iterator[Cluster]:
    """Ways to share `total` GPUs among the roles that have any: whole nodes, or parts of one.

    Trainer and teacher get 1, 2, 3, 4, 6, 8, 12, ... of them, the rollout the rest.
    """
    node = cluster.gpus_per_node
    unit = 1 if total <= 2 * node else node
    steps = sorted({f * 2**i * unit for i in range(15) for f in (1, 3)})
    steps = [step for step in steps if total / 64 <= step < total]
    for training in steps if cluster.gpus > cluster.trainer else [total]:
        for scoring in steps if cluster.teacher else [0]:
            rest = total - training - scoring
            if not cluster.rollout:
                training, rest = training + rest, 0
            if training > 0 and (rest > 0 or not cluster.rollout):
                shares = {"trainer": training, "teacher": scoring, "rollout": rest}
                found = cluster.model_copy(update=shares)
                if not found.uneven_roles and len(found.nodes) <= -(-total // node):
                    yield found


def _best(
    setup: Setup,
    options: Iterator[dict[str, object]],
    role: Callable[[Setup], Role],
    seconds: Callable[[Setup], float],
) -> dict[str, object] | None:
    """The options of least time among those with which the role fits; None if none does."""
    best, least = None, float("inf")
    for changes in options:
        candidate = setup.changed(changes)
        found = role(candidate)
        if found.fits and found.margin > MARGIN * found.capacity:
            time = seconds(candidate)
            if time < least:
                best, least = changes, time
    return best


def _best_trainer(setup: Setup) -> dict[str, object] | None:
    student = planning_config(setup.recipe.student.hf)

    def options() -> Iterator[dict[str, object]]:
        for layout in _layouts(setup, student, setup.cluster.trainer, (1, 2, 4)):
            for recompute in ("none", "selective", "full"):
                yield {"student.parallel": layout, "student.recompute": recompute}

    def seconds(candidate: Setup) -> float:
        return sum(time for _, time in training_phases(candidate))

    return _best(setup, options(), trainer, seconds)


def _best_teachers(setup: Setup) -> dict[str, object] | None:
    """Each service's best layout; None if one has none."""
    found = {}
    for place, scorer in enumerate(setup.scorers):
        if scorer.key in setup.services:
            best = _best_teacher(setup, scorer, place)
            if best is None:
                return None
            found |= best
    return found


def _best_teacher(setup: Setup, scorer: Scorer, place: int) -> dict[str, object] | None:
    hf = planning_config(scorer.model.hf)

    def options() -> Iterator[dict[str, object]]:
        for layout in _layouts(setup, hf, scorer.gpus, (1,)):
            yield {f"{scorer.key}.service.parallel": layout}

    def role(candidate: Setup) -> Role:
        return teacher(candidate, candidate.scorers[place])

    def seconds(candidate: Setup) -> float:
        return scoring_seconds(candidate, candidate.scorers[place])

    return _best(setup, options(), role, seconds)


def _best_servers(setup: Setup) -> dict[str, object] | None:
    def options() -> Iterator[dict[str, object]]:
        for tp in DEGREES[:4]:
            if setup.cluster.rollout % tp == 0:
                start = setup.cluster.rollout // tp
                yield {"rollout.servers.tp": tp, "rollout.servers.start": start}

    return _best(setup, options(), rollout, lambda candidate: generation(candidate).seconds)


def _layouts(
    setup: Setup, hf: dict[str, Any], gpus: int, chunks: tuple[int, ...]
) -> Iterator[Layout]:
    """Layouts that Megatron accepts and whose unit divides `gpus`; tp x cp stays in a node."""
    experts = DEGREES if num_experts(hf) else (1,)
    for tp, pp, ep, cp in product(DEGREES[:4], DEGREES, experts, DEGREES[:4]):
        for vpp in chunks if pp > 1 else (1,):
            layout = Layout(tp=tp, pp=pp, vpp=vpp, ep=ep, cp=cp)
            if tp * cp <= setup.cluster.gpus_per_node and gpus % layout.unit == 0:
                with contextlib.suppress(RecipeError):
                    check_layout(layout, hf, "student")
                    yield layout
