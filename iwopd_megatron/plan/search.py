"""Other layouts and splits of the GPUs between roles, best first.

Each role's best layout is found for each number of GPUs on its own: least time among those that
fit. Then the splits are compared by the round's time, since roles run at once and wait for another.
Seconds of a micro-batch do not depend on the number of GPUs, so they are computed once a layout.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product

from iwopd_megatron.config.cluster import Cluster
from iwopd_megatron.config.models import Layout
from iwopd_megatron.config.preflight import check_layout
from iwopd_megatron.config.stages import with_stages
from iwopd_megatron.errors import RecipeError
from iwopd_megatron.hf.config import HfConfig
from iwopd_megatron.hf.known_models import planning_config
from iwopd_megatron.plan.phases import (
    generation,
    passes,
    sync_seconds,
    trained,
)
from iwopd_megatron.plan.plan import Plan
from iwopd_megatron.plan.roles import PlannedRole, rollout_role, teacher_role, trainer_role
from iwopd_megatron.plan.setup import Setup
from iwopd_megatron.plan.time import Workload, forward, forward_backward

MARGIN = 0.05  # of a GPU's memory that a proposal leaves free
DEGREES = (1, 2, 4, 8, 16, 32, 64)


Changes = dict[str, object]  # values at dotted keys of the recipe
Found = dict[int, Changes | None]  # a role's best, by its GPUs; None: nothing fits


@dataclass(frozen=True)
class Option:
    """A layout that a role may have, with what its time on any number of GPUs follows from."""

    changes: Changes
    load: Workload
    stage: float  # seconds of a micro-batch on a pipeline stage


def search(plan: Plan, gpus: int | None = None, layouts: bool = True) -> list[Plan]:
    """Return plans on `gpus` (default: as many), fastest round first, those that fit before others.

    layouts: also other layouts, recomputation and server sizes; else only the split changes.
    """
    setup = plan.setup
    shares = map(setup.divided, splits(setup.cluster, gpus or plan.gpus))
    bases = [setup.on(share) for share in shares if all(share[key] for key in setup.services)]
    best: dict[str, Found] = {}
    if layouts and bases:
        finders = {"trainer": _best_trainers, "teacher": _best_teachers, "rollout": _best_servers}
        for role, find in finders.items():
            by_count = {getattr(base.cluster, role): base for base in bases}
            best[role] = {0: {}} if 0 in by_count else find(by_count)
    found = []
    for base in bases:
        parts = [best[role][getattr(base.cluster, role)] for role in best]
        fitting = [part for part in parts if part is not None]
        if len(fitting) == len(parts):
            candidate = base.changed({key: new for part in fitting for key, new in part.items()})
            with contextlib.suppress(RecipeError):
                candidate.check()
                found.append(Plan(candidate))
    return sorted(found, key=lambda plan: (not plan.fits, plan.seconds))


def splits(cluster: Cluster, total: int) -> Iterator[Cluster]:
    """Yield ways to share `total` GPUs among the roles that have any: whole nodes, or parts of one.

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


def _best_trainers(bases: dict[int, Setup]) -> Found:
    setup = next(iter(bases.values()))
    train, options = setup.recipe.train, []
    embedded = [teacher.model.hf for teacher in setup.teachers if not teacher.model.is_remote]
    models = [planning_config(folder) for folder in (setup.recipe.student.hf, *embedded)]
    for layout in _layouts(setup, models, (1, 2, 4)):
        load = setup.load(setup.student, layout, setup.filled(train.microbatch_tokens))
        for recompute in ("none", "selective", "full"):
            changes: Changes = {"student.parallel": layout, "student.recompute": recompute}
            options.append(Option(changes, load, forward_backward(load, recompute)))
    sync = {count: sync_seconds(base) for count, base in bases.items()}

    def floor(base: Setup, option: Option) -> float:
        """Return the seconds without optimiser steps and passes that only score."""
        gpus = base.cluster.trainer
        return passes(base, option.load, gpus, option.stage) * train.epochs + sync[gpus]

    def seconds(base: Setup, option: Option) -> float:
        return sum(time for _, time in trained(base, option.load, option.stage))

    counts = {count: count for count in bases}
    return _by_count(bases, counts, options, floor, seconds, trainer_role)


def _best_teachers(bases: dict[int, Setup]) -> Found:
    """Return every service's best layout, by GPUs of all services."""
    found: Found = {count: {} for count in bases}
    for key in next(iter(bases.values())).services:
        for count, changes in _best_service(bases, key).items():
            others = found[count]
            found[count] = None if changes is None or others is None else others | changes
    return found


def _best_service(bases: dict[int, Setup], key: str) -> Found:
    setup, options = next(iter(bases.values())), []
    teacher = setup.teacher(key)
    for layout in _layouts(setup, [planning_config(teacher.model.hf)], (1,)):
        load = setup.load(teacher.size, layout, setup.filled(teacher.tokens))
        options.append(Option({f"{key}.service.parallel": layout}, load, forward(load)))

    def seconds(base: Setup, option: Option) -> float:
        return passes(base, option.load, base.services[key], option.stage, teacher.share)

    def role(candidate: Setup) -> PlannedRole:
        return teacher_role(candidate, candidate.teacher(key))

    counts = {count: base.services[key] for count, base in bases.items()}
    return _by_count(bases, counts, options, seconds, seconds, role)


def _best_servers(bases: dict[int, Setup]) -> Found:
    found: Found = {}
    for gpus, base in bases.items():
        options: list[Changes] = [
            {"rollout.servers.tp": tp, "rollout.servers.start": gpus // tp}
            for tp in DEGREES[:4]
            if gpus % tp == 0
        ]
        fitting = [changes for changes in options if _has_room(rollout_role(base.changed(changes)))]
        found[gpus] = min(
            fitting, key=lambda changes: generation(base.changed(changes)).seconds, default=None
        )
    return found


def _by_count(
    bases: dict[int, Setup],
    counts: dict[int, int],
    options: list[Option],
    floor: Callable[[Setup, Option], float],
    seconds: Callable[[Setup, Option], float],
    role: Callable[[Setup], PlannedRole],
) -> Found:
    """Return for each of `bases`, where the role has `counts` GPUs, the fastest option that fits.

    Seconds of an option are at least its `floor`, so once that exceeds the best's none is better.
    Memory comes last; what does not fit on many GPUs does not fit on fewer.
    """
    found: Found = {}
    misfits: set[int] = set()
    for key in sorted(bases, reverse=True):
        base, best, least = bases[key], None, (float("inf"), 0)
        floors = [
            (floor(base, option), place)
            for place, option in enumerate(options)
            if place not in misfits and counts[key] % option.load.layout.unit == 0
        ]
        for at_least, place in sorted(floors):
            if at_least > least[0] * (1 + 1e-9):  # the two are sums in different orders
                break
            time = seconds(base, options[place]), place
            if time >= least:
                continue
            if _has_room(role(base.changed(options[place].changes))):
                best, least = options[place].changes, time
            else:
                misfits.add(place)
        found[key] = best
    return found


def _has_room(role: PlannedRole) -> bool:
    return role.fits and role.margin > MARGIN * role.capacity


def _layouts(setup: Setup, models: list[HfConfig], chunks: tuple[int, ...]) -> Iterator[Layout]:
    """Yield layouts that Megatron accepts of the first model and those embedded beside it.

    tp x cp stays in a node; stages are uneven only where the first's layers do not divide.
    """
    first, *others = models
    experts = DEGREES if first.num_experts else (1,)
    for tp, pp, ep, cp in product(DEGREES[:4], DEGREES, experts, DEGREES[:4]):
        if tp * cp <= setup.cluster.gpus_per_node:
            for vpp in chunks if pp > 1 else (1,):
                axes = Layout(tp=tp, pp=pp, vpp=vpp, ep=ep, cp=cp)
                layout = with_stages(axes, first.num_hidden_layers)
                with contextlib.suppress(RecipeError):
                    if layout is not None:
                        check_layout(layout, first, "student")
                        for model in others:
                            check_layout(layout, model, "teacher")
                        yield layout
