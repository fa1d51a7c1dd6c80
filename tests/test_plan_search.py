"""The planner's search leaves out only what cannot be best."""

from pathlib import Path

import pytest

from iwopd_megatron.config.load import read_recipe
from iwopd_megatron.hf.known_models import planning_config
from iwopd_megatron.plan import search as plan_search
from iwopd_megatron.plan.phases import scoring_seconds, training_phases
from iwopd_megatron.plan.plan import plan
from iwopd_megatron.plan.roles import teacher_role, trainer_role

pytestmark = pytest.mark.usefixtures("in_the_repository")
RECIPE = Path("recipes/qwen3_235b_a22b_to_30b_a3b.yaml")
RECOMPUTE = ("none", "selective", "full")


def bases(role, counts, words=()):
    """By GPUs of the role: the recipe with so many."""
    setup = plan(read_recipe(RECIPE, list(words))).setup
    return {count: setup.on(setup.gpus | {role: count}) for count in counts}


def layouts(base, gpus, model, chunks):
    found = plan_search._layouts(base, [planning_config(model.hf)], chunks)
    return [layout for layout in found if gpus % layout.unit == 0]


def best_of(base, options, role, seconds):
    """By looking at every option in full."""
    best, least = None, float("inf")
    for changes in options:
        candidate = base.changed(changes)
        found = role(candidate)
        has_room = found.margin > plan_search.MARGIN * found.capacity
        if has_room and (time := seconds(candidate)) < least:
            best, least = changes, time
    return best


@pytest.mark.parametrize(
    "words",
    [[], ["loss.extrapolation=1.25", "train.minibatches=2"], ["rollout.sync=disk"]],
    ids=["iw", "base_and_old_scores", "disk"],
)
def test_the_trainers_best_layout_is_that_of_an_exhaustive_search(words):
    given = bases("trainer", (2, 8, 16, 32, 192, 4096), words)
    found = plan_search._best_trainers(given)
    assert found[2] is None and len({str(changes) for changes in found.values()}) > 2
    for gpus, base in given.items():
        options = [
            {"student.parallel": layout, "student.recompute": recompute}
            for layout in layouts(base, gpus, base.recipe.student, (1, 2, 4))
            for recompute in RECOMPUTE
        ]
        expected = best_of(
            base, options, trainer_role, lambda s: sum(seconds for _, seconds in training_phases(s))
        )
        assert found[gpus] == expected


def test_a_services_best_layout_is_that_of_an_exhaustive_search():
    given = bases("teacher", (4, 8, 64, 512))
    found = plan_search._best_teachers(given)
    assert found[4] is None and len({str(changes) for changes in found.values()}) > 2
    for gpus, base in given.items():
        options = [
            {"teacher.service.parallel": layout}
            for layout in layouts(base, gpus, base.recipe.teacher, (1,))
        ]
        expected = best_of(
            base,
            options,
            lambda s: teacher_role(s, s.teachers[0]),
            lambda s: scoring_seconds(s, s.teachers[0]),
        )
        assert found[gpus] == expected


def test_no_split_no_proposal():
    now = plan(read_recipe(RECIPE))
    assert plan_search.search(now, 2) == []
