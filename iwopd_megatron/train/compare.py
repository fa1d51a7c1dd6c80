"""Arms x seeds of one recipe, for one world: same start, data order and random numbers."""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass
from pathlib import Path

from iwopd_megatron.config.load import load_recipe
from iwopd_megatron.config.recipe import Recipe
from iwopd_megatron.data.run_data import RunData
from iwopd_megatron.errors import RecipeError
from iwopd_megatron.records.runlog import read_metrics
from iwopd_megatron.records.words import ARM_IDS


@dataclass(frozen=True)
class Arm:
    """One run of a comparison. data: the recipe's, once it is loaded."""

    name: str
    seed: int
    recipe: Recipe
    data: RunData | None = None


def plan_arms(recipe: Path, overrides: list[str], vary: str, seeds: int, out: Path) -> list[Arm]:
    """Return a run for each seed 1..`seeds` and, within it, each value of `vary`.

    vary: KEY=VALUE,VALUE,... of the recipe; out: every run has a folder in it. RecipeError where
    that cannot be compared in one world.
    """
    key, equals, values = vary.partition("=")
    if not equals or not values:
        raise RecipeError(
            f"--vary '{vary}' is not KEY=VALUE,VALUE; write e.g. loss.weighting.rule=uniform,iw."
        )
    names = _arm_ids(values.split(","), vary)
    arms = []
    for seed, (name, value) in itertools.product(range(1, seeds + 1), names.items()):
        own = [f"{key}={value}", f"train.seed={seed}", f"out={out / name / f'seed_{seed}'}"]
        arms.append(Arm(name, seed, load_recipe(recipe, [*overrides, *own])))
        if arms[-1].recipe.student.parallel != arms[0].recipe.student.parallel:
            raise RecipeError(
                f"--vary '{vary}' changes the layout; all arms share one world: "
                "compare layouts with separate runs and 'iwopd report'."
            )
    return arms


def _arm_ids(values: list[str], vary: str) -> dict[str, str]:
    """Return each arm's value by the name of its folder, which is one level deep."""
    names: dict[str, str] = {}
    for value in values:
        name = re.sub(r"[^\w.+-]+", "_", ARM_IDS.get(value, value)).strip("_.") or "empty"
        if name in names:
            same = "twice" if names[name] == value else f"beside '{names[name]}'"
            raise RecipeError(
                f"--vary '{vary}' has '{value}' {same}, and each arm has a folder of its own, "
                f"here {name}; name values that differ."
            )
        names[name] = value
    return names


def is_finished(arm: Arm) -> bool:
    """Return whether the run reached its last round and wrote its weights, which it does last."""
    run = arm.recipe.out
    if not (run / "hf" / "config.json").is_file():
        return False
    last = max((line["round"] for line in read_metrics(run)), default=0)
    return last >= arm.recipe.train.rounds
