"""Runs as numbers: which arms and seeds there are, their curves, their means and intervals.

An arm is a method, a run is one seed of it. Standard errors are over seeds; differences from OPD
are paired by seed: the same data order and the same start, so the seed's own noise cancels.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from iwopd_megatron.errors import RecipeError
from iwopd_megatron.runlog import read_metrics
from iwopd_megatron.yaml_file import read_yaml

Paths = dict[str, list[Path]]  # arm -> its run folders, by seed
Runs = dict[str, dict[int, list[dict]]]  # arm -> seed -> records
Curve = dict[float, float]  # x -> y
Reduce = Callable[[list[dict]], Curve]  # of the records of a run
REFERENCE = "opd"
SEEN = 0.05
ARM_NAMES = {"opd": "OPD", "iw": "IW-OPD"}
# 97.5 % quantiles of Student's t for 1, 2, ... 10 degrees of freedom n; for more, Fisher's series
# 1.96 + 2.372 / n + 2.823 / n^2 is right to 0.003.
T_QUANTILES = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)


def seed_of(run: Path) -> int:
    """From the folder name `seed_<n>`, else from the recipe, else 0."""
    recipe = run / "recipe.yaml"
    text = recipe.read_text("utf-8", errors="replace") if recipe.exists() else ""
    found = re.search(r"seed_(\d+)$", run.name) or re.search(r"^\s*seed:\s*(\d+)\s*$", text, re.M)
    return int(found.group(1)) if found else 0


def find_runs(folders: Sequence[Path]) -> Paths:
    """The runs of run folders and of folders of compared runs: OPD and IW-OPD first, then by name.

    An arm that several folders have keeps apart by the folder's name, unless the folders are runs
    of it themselves (ARM/seed_<n>).
    """
    found = [_runs_of(folder) for folder in folders]
    paths: Paths = {}
    for folder, runs in zip(folders, found, strict=True):
        for arm, own in runs.items():
            is_shared = sum(arm in other for other in found) > 1
            is_comparison = not (folder / "metrics.jsonl").exists()
            name = f"{folder.resolve().name}/{arm}" if is_shared and is_comparison else arm
            known = paths.setdefault(name, [])
            known += [run for run in own if run.resolve() not in {x.resolve() for x in known}]
    ordered = sorted(paths, key=lambda arm: (arm != REFERENCE, arm != "iw", arm))
    return {arm: sorted(paths[arm], key=seed_of) for arm in ordered}


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
    """All records. Of runs that share arm and seed, later ones get the next free seed."""
    runs: Runs = {}
    for arm, folders in paths.items():
        runs[arm] = {}
        for folder in folders:
            seed = seed_of(folder)
            while seed in runs[arm]:
                seed += 1
            runs[arm][seed] = read_metrics(folder)
    return runs


def mean(values: Iterable[float | None]) -> float | None:
    """Of the values that are there."""
    kept = [value for value in values if value is not None]
    return sum(kept) / len(kept) if kept else None


def stderr(values: Iterable[float | None]) -> float | None:
    """Sample standard deviation over sqrt(n); None for fewer than two values."""
    kept = [value for value in values if value is not None]
    return statistics.stdev(kept) / len(kept) ** 0.5 if len(kept) > 1 else None


def interval(values: Iterable[float | None]) -> list[float] | None:
    """95 % confidence interval of the mean by Student's t; None for fewer than two values."""
    kept = [value for value in values if value is not None]
    if len(kept) < 2:
        return None
    free = len(kept) - 1
    t = T_QUANTILES[free - 1] if free <= len(T_QUANTILES) else 1.96 + 2.372 / free + 2.823 / free**2
    return [mean(kept) - t * stderr(kept), mean(kept) + t * stderr(kept)]


def series(records: list[dict], kind: str, key: str, scale: float = 1) -> Curve:
    """Round -> value times scale, for the records that have one."""
    found = [r for r in records if r["kind"] == kind and r.get(key) is not None]
    return {r["round"]: scale * r[key] for r in sorted(found, key=lambda r: r["round"])}


def by_position(records: list[dict], key: str, part: slice, scale: float = 1) -> Curve:
    """Mean over the tokens of some rounds at each decile (1 to 10), or each bin's middle token.

    key: e.g. weight_deciles or weight_positions. Places without a token are left out, and
    positions where fewer than SEEN of the responses still go on.
    """
    kind = key.rpartition("_")[2]
    rows = [r for r in records if r.get(key) and r.get(f"tokens_{kind}")][part]
    total: dict[int, list[float]] = {}
    for row in rows:
        for place, (value, count) in enumerate(zip(row[key], row[f"tokens_{kind}"], strict=True)):
            if value is not None and count:
                sums = total.setdefault(place, [0.0, 0])
                sums[0] += value * count
                sums[1] += count
    width = rows[0].get("bin_tokens", 1) if rows and kind == "positions" else 1
    fewest = SEEN * total.get(0, [0, 0])[1] if kind == "positions" else 1
    return {
        place * width + (width + 1) / 2: scale * total[place][0] / total[place][1]
        for place in sorted(total)
        if total[place][1] >= fewest
    }


def keys_of(runs: Runs, prefix: str) -> list[str]:
    """All metrics of this beginning."""
    lines = (line for arm in runs.values() for run in arm.values() for line in run)
    return sorted({key for line in lines for key in line if key.startswith(prefix)})


def is_zero(runs: Runs, key: str) -> bool:
    """Whether no round of any run has another value."""
    return not any(line.get(key) for arm in runs.values() for run in arm.values() for line in run)


def prefix_logp(records: list[dict], part: slice) -> tuple[Curve, Curve]:
    """Tokens of a prefix -> its log-likelihood under student and teacher, nats, mean of responses.

    A response that is shorter counts with all its tokens. Linear, so bins' sums are all it takes.
    """
    rows = [r for r in records if r.get("logp_positions") and r.get("responses")][part]
    student, teacher = 0.0, 0.0
    curves: tuple[Curve, Curve] = {0: 0.0}, {0: 0.0}
    responses = sum(row["responses"] for row in rows)
    for place in range(len(rows[0]["tokens_positions"]) if rows else 0):
        counts = [row["tokens_positions"][place] for row in rows]
        if not any(counts):
            break
        for row, count in zip(rows, counts, strict=True):
            logp, kl = row["logp_positions"][place], row["reverse_kl_positions"][place]
            student += count * (logp or 0) / responses
            teacher += count * ((logp or 0) - (kl or 0)) / responses
        end = (place + 1) * rows[0].get("bin_tokens", 1)
        curves[0][end], curves[1][end] = student, teacher
    return curves if rows else ({}, {})


def scores(records: list[dict]) -> dict[str, float | None]:
    """Accuracy at the start, by step 10, at the end, and its mean over the evaluations."""
    accuracy = series(records, "eval", "accuracy")
    return {
        "start": accuracy.get(0),
        "step10": accuracy.get(max((r for r in accuracy if 0 < r <= 10), default=-1)),
        "final": accuracy.get(max(accuracy, default=-1)),
        "auc": mean(accuracy.values()),
    }


def gains(seeds: dict[int, list[dict]], reference: dict[int, list[dict]]) -> list[Curve]:
    """Step -> accuracy minus the reference's at that step, points, of each seed both have."""
    curves = []
    for seed in seeds.keys() & reference.keys():
        own, other = (series(runs[seed], "eval", "accuracy", 100) for runs in (seeds, reference))
        curves.append(difference(other, own))
    return [curve for curve in curves if curve]


def difference(a: Curve, b: Curve) -> Curve:
    """b - a where both are."""
    return {x: b[x] - a[x] for x in a if x in b}


def mean_curve(curves: list[Curve]) -> Curve:
    """Where all are."""
    return {x: mean(c[x] for c in curves) for x in curves[0] if all(x in c for c in curves)}


def _summarise_arm(seeds: dict[int, list[dict]]) -> dict[str, Any]:
    """Means over seeds; `rounds` of the longest run, `seconds` of all runs with evaluations."""
    start, step10, final, auc = zip(*(scores(run).values() for run in seeds.values()), strict=True)
    return {
        "accuracy_start": mean(start),
        "accuracy_step10": mean(step10),
        "accuracy_final": mean(final),
        "stderr": stderr(final),
        "stderr_step10": stderr(step10),
        "accuracy_per_seed_final": list(final),
        "area_under_curve": mean(auc),
        "seeds": list(seeds),
        "rounds": max(sum(r["kind"] == "round" for r in records) for records in seeds.values()),
        "seconds": sum(r.get("seconds") or 0 for records in seeds.values() for r in records),
    }


def _pair(seeds: dict[int, list[dict]], reference: dict[int, list[dict]]) -> dict[str, Any]:
    """Mean difference from the reference over the seeds both have, its error and interval."""
    pairs = [(scores(seeds[s]), scores(reference[s])) for s in seeds if s in reference]
    result: dict = {"seeds": len(pairs)}
    for key in ("final", "auc", "step10"):
        found = [a[key] - b[key] for a, b in pairs if None not in (a[key], b[key])]
        result |= {key: mean(found), f"{key}_stderr": stderr(found)}
        result[f"{key}_interval"] = interval(found)
    return result


def summarise(paths: Paths) -> dict[str, Any]:
    """Accuracies per arm, and each arm's paired differences from `opd`; None where unknown."""
    data = read_runs(paths)
    others = [arm for arm in data if arm != REFERENCE and REFERENCE in data]
    paired = {arm: _pair(data[arm], data[REFERENCE]) for arm in others}
    return {"arms": {arm: _summarise_arm(data[arm]) for arm in data}, "paired": paired}


def read_recipe_of(run: Path) -> dict[str, Any]:
    """The run's resolved recipe as a tree; {} if there is none."""
    file = run / "recipe.yaml"
    return read_yaml(file, "recipe") if file.exists() else {}
