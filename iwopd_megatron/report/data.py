"""Runs of a report as numbers: which arms and seeds there are, their records and curves.

An arm is a method, a run is one seed of it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from iwopd_megatron.errors import RecipeError
from iwopd_megatron.files.yaml_file import read_yaml
from iwopd_megatron.records.runlog import read_metrics
from iwopd_megatron.report.statistics import mean

Paths = dict[str, list[Path]]  # arm -> its run folders, by seed
Runs = dict[str, dict[int, list[dict]]]  # arm -> seed -> records
Curve = dict[float, float]  # x -> y
Reduce = Callable[[list[dict]], Curve]  # of the records of a run
REFERENCE = "opd"


def seed_of(run: Path) -> int:
    """Return a run's seed from the folder name `seed_<n>`, else from the recipe, else 0."""
    recipe = run / "recipe.yaml"
    text = recipe.read_text("utf-8", errors="replace") if recipe.exists() else ""
    found = re.search(r"seed_(\d+)$", run.name) or re.search(r"^\s*seed:\s*(\d+)\s*$", text, re.M)
    return int(found.group(1)) if found else 0


def find_runs(folders: Sequence[Path]) -> Paths:
    """Return the runs of run folders and of folders of compared runs, by arm.

    OPD and IW-OPD come first, then arms by name. Raises RecipeError for a folder without a run.

    Comparisons that share an arm keep all their arms apart as FOLDER/ARM; runs that are given one
    by one (ARM/seed_<n>) are seeds of one arm.
    """
    folders = list({folder.resolve(): folder for folder in folders}.values())
    found = [_runs_of(folder) for folder in folders]
    names = _names(folders)
    paths: Paths = {}
    for folder, name, runs in zip(folders, names, found, strict=True):
        is_comparison = not (folder / "metrics.jsonl").exists()
        is_shared = any(sum(arm in other for other in found) > 1 for arm in runs)
        for arm, own in runs.items():
            known = paths.setdefault(f"{name}/{arm}" if is_shared and is_comparison else arm, [])
            known += [run for run in own if run.resolve() not in {x.resolve() for x in known}]
    ordered = sorted(paths, key=_place)
    return {arm: sorted(paths[arm], key=seed_of) for arm in ordered}


def _place(arm: str) -> tuple:
    folder, _, rule = arm.rpartition("/")
    return folder, rule != REFERENCE, rule != "iw", rule


def _names(folders: Sequence[Path]) -> list[str]:
    """Return the folders' names, and of different folders with one name their whole paths."""
    places = [folder.resolve() for folder in folders]
    same = {place.name: {other for other in places if other.name == place.name} for place in places}
    return [place.name if len(same[place.name]) == 1 else str(place) for place in places]


def _runs_of(folder: Path) -> Paths:
    if (folder / "metrics.jsonl").exists():
        place = folder.resolve()
        return {place.parent.name if re.match(r"seed_\d+$", place.name) else place.name: [folder]}
    runs: Paths = {}
    for path in folder.glob("*/seed_*/metrics.jsonl"):
        runs.setdefault(path.parent.parent.name, []).append(path.parent)
    if not runs:
        remedy = "give a folder with metrics.jsonl or <arm>/seed_<n>/metrics.jsonl in it"
        raise RecipeError(f"{folder} holds no run: {remedy}")
    return runs


def read_runs(paths: Paths) -> Runs:
    """Return all records of the runs' metrics.jsonl.

    Of runs that share arm and seed, later ones get the next free seed.
    """
    runs: Runs = {}
    for arm, folders in paths.items():
        runs[arm] = {}
        for folder in folders:
            seed = seed_of(folder)
            while seed in runs[arm]:
                seed += 1
            runs[arm][seed] = read_metrics(folder)
    return runs


def series(records: list[dict], kind: str, key: str, scale: float = 1) -> Curve:
    """Return round -> value times scale, for the records that have one."""
    found = [r for r in records if r["kind"] == kind and r.get(key) is not None]
    return {r["round"]: scale * r[key] for r in sorted(found, key=lambda r: r["round"])}


def keys_of(runs: Runs, prefix: str) -> list[str]:
    """Return all metrics whose names begin so."""
    lines = (line for arm in runs.values() for run in arm.values() for line in run)
    return sorted({key for line in lines for key in line if key.startswith(prefix)})


def is_zero(runs: Runs, key: str) -> bool:
    """Return whether no round of any run has another value."""
    return not any(line.get(key) for arm in runs.values() for run in arm.values() for line in run)


def difference(a: Curve, b: Curve) -> Curve:
    """Return x -> b - a at the points that both have."""
    return {x: b[x] - a[x] for x in a if x in b}


def mean_curve(curves: list[Curve]) -> Curve:
    """Return the mean of one or more curves at the points that all have."""
    return {x: mean([c[x] for c in curves]) for x in curves[0] if all(x in c for c in curves)}


def read_recipe_of(run: Path) -> dict[str, Any]:
    """Return the run's resolved recipe as a tree of its YAML; {} if there is none."""
    file = run / "recipe.yaml"
    return read_yaml(file, "recipe") if file.exists() else {}
