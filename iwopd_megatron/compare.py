"""Arms x seeds of one recipe in one world: same start, data order, random numbers; one report."""

from __future__ import annotations

import itertools
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from iwopd_megatron.config import Recipe
from iwopd_megatron.errors import RecipeError
from iwopd_megatron.jsonl import write_whole
from iwopd_megatron.recipe import load_recipe
from iwopd_megatron.runlog import read_metrics

ARM_NAMES = {"uniform": "opd"}  # uniform token weights are plain OPD


@dataclass(frozen=True)
class Arm:
    """One run of a comparison."""

    name: str
    seed: int
    recipe: Recipe


def plan_arms(recipe: Path, overrides: list[str], vary: str, seeds: int, out: Path) -> list[Arm]:
    """An arm per value of `vary` (KEY=VALUE,...), runs for train.seed 1..`seeds`, outermost."""
    key, equals, values = vary.partition("=")
    if not equals or not values:
        raise RecipeError(
            f"--vary '{vary}' is not KEY=VALUE,VALUE; write e.g. loss.weighting.rule=uniform,iw."
        )
    arms = []
    for seed, value in itertools.product(range(1, seeds + 1), values.split(",")):
        name = ARM_NAMES.get(value, value)
        own = [f"{key}={value}", f"train.seed={seed}", f"out={out / name / f'seed_{seed}'}"]
        arms.append(Arm(name, seed, load_recipe(recipe, [*overrides, *own])))
        if arms[-1].recipe.student.parallel != arms[0].recipe.student.parallel:
            raise RecipeError(
                f"--vary '{vary}' changes the layout; all arms share one world: "
                "compare layouts with separate runs and 'iwopd report'."
            )
    return arms


def write_summary(out: Path, summary: dict[str, Any]) -> Path:
    """out/summary.json, atomically."""
    path = out / "summary.json"
    write_whole(path, json.dumps(summary, indent=2, allow_nan=False) + "\n")
    return path


def print_table(summary: dict[str, Any]) -> None:
    """Print both arms of `report.summarise` as a table: means over seeds, +- standard errors."""
    table = Table(title="accuracy: mean over seeds ± standard error")
    for heading in (
        "arm",
        "seeds",
        "start",
        "step 10",
        "final",
        "final against OPD, paired",
        "area under curve, paired",
    ):
        table.add_column(heading, justify="left" if heading == "arm" else "right")
    for name, arm in summary["arms"].items():
        paired = summary["paired"].get(name, {})
        table.add_row(
            name,
            str(len(arm["seeds"])),
            _plus_minus(arm["accuracy_start"]),
            _plus_minus(arm["accuracy_step10"], arm["stderr_step10"]),
            _plus_minus(arm["accuracy_final"], arm["stderr"]),
            _plus_minus(paired.get("final"), paired.get("final_stderr"), "+"),
            _plus_minus(paired.get("auc"), paired.get("auc_stderr"), "+"),
        )
    Console(width=None if sys.stdout.isatty() else 120).print(table)


def _plus_minus(value: float | None, error: float | None = None, sign: str = "") -> str:
    if value is None:
        return "-"
    return f"{value:{sign}.3f}" + (f" ± {error:.3f}" if error is not None else "")


def is_finished(arm: Arm) -> bool:
    """Whether the run reached its last round and wrote its final weights, which is its last act."""
    run = arm.recipe.out
    if not (run / "hf" / "config.json").is_file():
        return False
    last = max((line["round"] for line in read_metrics(run)), default=0)
    return last >= arm.recipe.train.rounds
