"""Scores on benchmarks: what `iwopd eval` measured of the runs, and the paper's numbers beside."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from iwopd_megatron.errors import RecipeError
from iwopd_megatron.jsonl import read_object
from iwopd_megatron.report_data import ARM_NAMES, Paths, mean, read_recipe_of, stderr

PLACES = {"trained": "final", "start": "before"}


def paper_results(run: Path) -> dict[str, dict[str, float]]:
    """Row -> benchmark -> score (%) where the paper has the run's pair of models, else {}."""
    recipe = read_recipe_of(run)
    teacher, student = (_model(recipe.get(key)) for key in ("teacher", "student"))
    known = _paper()
    rows = known["pairs"].get(f"{teacher} -> {student}", {})
    return {name: dict(zip(known["benchmarks"], row, strict=True)) for name, row in rows.items()}


def _paper() -> dict[str, Any]:
    return json.loads(Path(__file__).with_name("paper_results.json").read_text("utf-8"))


def _model(section: Any) -> str:
    return Path((section or {}).get("hf") or "").name


def measured(paths: Paths) -> dict[str, dict[str, dict[str, Any]]]:
    """Row (arm and checkpoint) -> benchmark -> score (%), error or interval, samples, seeds."""
    found: dict[str, dict[str, list[dict]]] = {}
    for arm, runs in paths.items():
        for run in runs:
            for file in sorted(run.glob("eval/*/results.json")):
                place = file.parent.name
                step = PLACES.get(place) or f"step {int(place.rpartition('_')[2])}"
                row = found.setdefault(f"{ARM_NAMES.get(arm, arm)}, {step}", {})
                for bench, result in _benchmarks(file).items():
                    row.setdefault(bench, []).append(result)
    return {row: {b: _pooled(x) for b, x in benches.items()} for row, benches in found.items()}


def _benchmarks(file: Path) -> dict[str, Any]:
    found = read_object(file).get("benchmarks")
    if not isinstance(found, dict):
        raise RecipeError(f"{file} is damaged: it has no 'benchmarks'; remove it.")
    return found


def _pooled(results: list[dict]) -> dict[str, Any]:
    """Over seeds: mean and standard error. Of one run: its bootstrap interval over problems."""
    error = stderr(result["mean"] for result in results)
    only = [100 * bound for bound in results[0]["mean_interval"]] if error is None else None
    return {
        "score": 100 * mean(result["mean"] for result in results),
        "error": None if error is None else 100 * error,
        "interval": only,
        "samples": results[0]["samples"],
        "seeds": len(results),
    }


def benchmark_table(paths: Paths) -> dict[str, Any] | None:
    """Both, by columns that any of them has; None where neither is known."""
    own = measured(paths)
    paper = paper_results(next(iter(paths.values()))[0])
    names = dict.fromkeys(name for rows in (own, paper) for row in rows.values() for name in row)
    if not names:
        return None
    return {"names": list(names), "own": own, "paper": paper, "source": _paper()["source"]}
