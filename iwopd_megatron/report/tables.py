"""The table of benchmarks: what `iwopd eval` measured of the runs beside the paper's numbers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from iwopd_megatron.errors import RecipeError
from iwopd_megatron.files.run_files import read_object
from iwopd_megatron.records.words import (
    ARM_IDS,
    UNKNOWN,
    arm_name,
    percent,
    percent_interval,
    plus_minus,
)
from iwopd_megatron.report.arms import Cell, Table
from iwopd_megatron.report.data import Paths, read_recipe_of
from iwopd_megatron.report.statistics import mean_or_none, stderr_or_none

PLACES = {"trained": "final", "start": "before"}


def paper_results(run: Path) -> dict[str, dict[str, float]]:
    """Return row -> benchmark -> score (0 to 1) as the paper has them for the run's pair of models.

    {} where it has none.
    """
    recipe = read_recipe_of(run)
    teacher, student = (_model(recipe.get(key)) for key in ("teacher", "student"))
    known = _paper()
    rows = known["pairs"].get(f"{teacher} -> {student}", {})
    return {
        name: {bench: score / 100 for bench, score in zip(known["benchmarks"], row, strict=True)}
        for name, row in rows.items()
    }


def _paper() -> dict[str, Any]:
    return json.loads(Path(__file__).with_name("paper_results.json").read_text("utf-8"))


def about(paths: Paths) -> str:
    """Return a sentence on the models and token weights that all arms' recipes agree on, or ""."""
    recipes = [read_recipe_of(runs[0]) for runs in paths.values()]
    found = []
    for role in ("student", "teacher"):
        sections = [recipe.get(role) for recipe in recipes]
        places = {section.get("hf") for section in sections if isinstance(section, dict)}
        if len(places) == 1 and None not in places:
            found.append(f"{role}: {places.pop()}")
    first, *others = (_rule(recipe) for recipe in recipes)
    if first is not None and all(rule == first for rule in others):
        found.append(f"token weights: {arm_name(first)}")
    text = "; ".join(found)
    return text[:1].upper() + text[1:] + "." if text else ""


def _rule(recipe: dict[str, Any]) -> str | None:
    """Return the arm's id that the recipe's weighting has; None without teacher or weighting."""
    loss = recipe.get("loss")
    weighting = loss.get("weighting") if isinstance(loss, dict) else None
    rule = weighting.get("rule") if isinstance(weighting, dict) else None
    has_teacher = bool(recipe.get("teacher") or recipe.get("teachers"))
    return ARM_IDS.get(rule, rule) if has_teacher and rule is not None else None


def _model(section: Any) -> str:
    return Path((section or {}).get("hf") or "").name


def measured(paths: Paths) -> dict[str, dict[str, dict[str, Any]]]:
    """Return row (arm and checkpoint) -> benchmark -> score, error or interval, samples, seeds."""
    found: dict[str, dict[str, list[dict]]] = {}
    for arm, runs in paths.items():
        for run in runs:
            for file in sorted(run.glob("eval/*/results.json")):
                place = file.parent.name
                step = PLACES.get(place) or f"round {int(place.rpartition('_')[2])}"
                row = found.setdefault(f"{arm_name(arm)}, {step}", {})
                for bench, result in _benchmarks(file).items():
                    row.setdefault(bench, []).append(result)
    return {row: {b: _pooled(x) for b, x in benches.items()} for row, benches in found.items()}


def _benchmarks(file: Path) -> dict[str, Any]:
    found = read_object(file).get("benchmarks")
    if not isinstance(found, dict):
        raise RecipeError(f"{file} is damaged: it has no 'benchmarks'; remove it.")
    return found


def _pooled(results: list[dict]) -> dict[str, Any]:
    """Return the score of one benchmark: mean and standard error over seeds.

    Of one run there is its bootstrap interval over problems instead of the error.
    """
    error = stderr_or_none(result["mean"] for result in results)
    return {
        "score": mean_or_none(result["mean"] for result in results),
        "error": error,
        "interval": results[0]["mean_interval"] if error is None else None,
        "samples": results[0]["samples"],
        "seeds": len(results),
    }


def benchmark_table(paths: Paths) -> dict[str, Any] | None:
    """Return both, scores from 0 to 1, by benchmarks that any of them has.

    None where neither is known. Raises RecipeError for a damaged results.json.
    """
    own = measured(paths)
    paper = paper_results(next(iter(paths.values()))[0])
    names = dict.fromkeys(name for rows in (own, paper) for row in rows.values() for name in row)
    if not names:
        return None
    return {"names": list(names), "own": own, "paper": paper, "source": _paper()["source"]}


def benchmarks_shown(paths: Paths) -> tuple[Table, set[int]] | None:
    """Return the table as text, and which of its rows are the paper's; None without one."""
    table = benchmark_table(paths)
    if table is None:
        return None
    names = table["names"]
    rows = [
        [Cell(row), *(_score(found.get(name)) for name in names)]
        for row, found in table["own"].items()
    ]
    theirs = [
        [Cell(f"Paper: {row}"), *(Cell(percent(found.get(name))) for name in names)]
        for row, found in table["paper"].items()
    ]
    headings = ["Arm and round", *(f"{name} (%)" for name in names)]
    numbers = set(range(len(rows), len(rows) + len(theirs)))
    return Table(headings, rows + theirs, _note(table)), numbers


def _score(one: dict[str, Any] | None) -> Cell:
    if one is None:
        return Cell(UNKNOWN)
    bounds = one["interval"]
    return Cell(plus_minus(one["score"], one["error"]), percent_interval(bounds) if bounds else "")


def _note(table: dict[str, Any]) -> str:
    """Return what a reader must know of the table, and only of what it holds."""
    cells = [cell for row in table["own"].values() for cell in row.values()]
    parts = ["Right answers in %, mean over samples and problems."]
    if any(cell["error"] is not None for cell in cells):
        parts.append("± is one standard error over seeds.")
    if any(cell["interval"] for cell in cells):
        parts.append("In brackets, for one seed: the 95 % bootstrap interval over problems.")
    if table["paper"]:
        parts.append(f"Paper: {table['source']}; a step there is a round here.")
    return " ".join(parts)
