"""Arms x seeds of one recipe in one world: same start, data order, random numbers; one report."""

from __future__ import annotations

import itertools
import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console
from rich.table import Table
from rich.text import Text

from iwopd_megatron.config.load import load_recipe
from iwopd_megatron.config.recipe import Recipe
from iwopd_megatron.data.run_data import RunData
from iwopd_megatron.errors import RecipeError
from iwopd_megatron.files.run_files import write_whole
from iwopd_megatron.records.runlog import read_metrics
from iwopd_megatron.records.words import ARM_IDS
from iwopd_megatron.report.arms import arm_table
from iwopd_megatron.report.finding import findings


@dataclass(frozen=True)
class Arm:
    """One run of a comparison; `data` once it is loaded."""

    name: str
    seed: int
    recipe: Recipe
    data: RunData | None = None


def plan_arms(recipe: Path, overrides: list[str], vary: str, seeds: int, out: Path) -> list[Arm]:
    """An arm per value of `vary` (KEY=VALUE,...), runs for train.seed 1..`seeds`, outermost."""
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
    """Folder name of each arm -> its value; one level deep, whatever the value is."""
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


def write_summary(out: Path, summary: dict[str, Any]) -> Path:
    """out/summary.json, atomically."""
    path = out / "summary.json"
    write_whole(path, json.dumps(summary, indent=2, allow_nan=False) + "\n")
    return path


def print_table(summary: dict[str, Any], file: TextIO | None = None) -> None:
    """Print what was found, and the arms of `report.summary.summarise`, as the page has them.

    file: default stdout.
    """
    shown = arm_table(summary)
    stream = file or sys.stdout
    console = Console(file=stream, width=None if stream.isatty() else 140, highlight=False)
    table = Table()
    for number, heading in enumerate(shown.headings):
        table.add_column(Text(heading), justify="right" if number else "left", overflow="fold")
    for row in shown.rows:
        table.add_row(*(Text("\n".join(filter(None, cell))) for cell in row))
    for sentence in findings(summary):
        console.print(Text(sentence))
    console.print(table)
    console.print(Text(shown.note))


def is_finished(arm: Arm) -> bool:
    """Whether the run reached its last round and wrote its final weights, which is its last act."""
    run = arm.recipe.out
    if not (run / "hf" / "config.json").is_file():
        return False
    last = max((line["round"] for line in read_metrics(run)), default=0)
    return last >= arm.recipe.train.rounds
