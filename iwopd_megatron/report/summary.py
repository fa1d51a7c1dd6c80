"""What a comparison measured: accuracies of every arm, and differences from its reference.

An arm is compared with OPD, or where there is none with the first arm. Differences are paired by
seed (same data order, same start: the seed's own noise cancels) over the seeds that both have; two
arms without a common seed are compared by Welch's test.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from iwopd_megatron.files.run_files import write_whole
from iwopd_megatron.report.data import (
    REFERENCE,
    Curve,
    Paths,
    difference,
    read_recipe_of,
    read_runs,
    series,
)
from iwopd_megatron.report.statistics import interval, mean, present, stderr, welch_interval

Seeds = dict[int, Curve]  # seed -> accuracy at each evaluated round
Measure = Callable[[Curve, int], float | None]  # of a curve, up to a round
EARLY = 10  # the paper's early checkpoint


def summarise(paths: Paths) -> dict[str, Any]:
    """{"arms": {arm: ...}, "paired": {arm: ...}}, shares from 0 to 1, None where unknown.

    Every figure is at one round of all the seeds it is of (`round`), the latest that at least half
    of them have an evaluation at; seeds that are not as far are left out of it.
    """
    data = read_runs(paths)
    curves = {
        arm: {seed: series(records, "eval", "accuracy") for seed, records in seeds.items()}
        for arm, seeds in data.items()
    }
    planned = {
        arm: {seed: _planned(run) for seed, run in zip(data[arm], paths[arm], strict=True)}
        for arm in data
    }
    arms = {arm: _arm(curves[arm], data[arm], planned[arm]) for arm in data}
    references = {arm: reference_of(arm, data) for arm in data}
    paired = {
        arm: {"reference": other} | _difference(curves[arm], curves[other])
        for arm, other in references.items()
        if other is not None
    }
    return {"arms": arms, "paired": paired}


def write_summary(out: Path, summary: dict[str, Any]) -> Path:
    """Write out/summary.json whole, and return its path."""
    path = out / "summary.json"
    write_whole(path, json.dumps(summary, indent=2, allow_nan=False) + "\n")
    return path


def reference_of(arm: str, arms: Iterable[str]) -> str | None:
    """OPD of the same folder, else the folder's first arm; None for that arm itself."""
    folder = arm.rpartition("/")[0]
    group = [other for other in arms if other.rpartition("/")[0] == folder]
    named = f"{folder}/{REFERENCE}" if folder else REFERENCE
    reference = named if named in group else group[0]
    return None if reference == arm else reference


def common_round(curves: Iterable[Curve]) -> int | None:
    """The latest round that at least half of the curves have, of those that have any."""
    return max(_reached(curves), default=None)


def far_enough(curves: list[Curve]) -> list[Curve]:
    """Those that go as far as the round at which at least half are."""
    end = common_round(curves)
    return [curve for curve in curves if end in curve]


def _reached(curves: Iterable[Curve]) -> set[int]:
    kept = [curve for curve in curves if curve]
    rounds = {x for curve in kept for x in curve}
    return {x for x in rounds if 2 * sum(x in curve for curve in kept) >= len(kept)}


def gains(seeds: Mapping[int, Curve], reference: Mapping[int, Curve]) -> dict[int, Curve]:
    """Seed -> round -> accuracy minus the reference's, of each seed both have."""
    found = {seed: difference(reference[seed], seeds[seed]) for seed in seeds if seed in reference}
    return {seed: curve for seed, curve in found.items() if curve}


def _final(curve: Curve, end: int) -> float | None:
    return curve.get(end)


def _early(curve: Curve, end: int) -> float | None:
    """At the last evaluation after the start and up to round 10."""
    return curve.get(max((x for x in curve if 0 < x <= EARLY), default=-1))


def _mean_up_to(curve: Curve, end: int) -> float | None:
    return mean(y for x, y in curve.items() if x <= end) if end in curve else None


MEASURES: dict[str, Measure] = {"final": _final, "auc": _mean_up_to, "step10": _early}


def _arm(
    curves: Seeds, data: dict[int, list[dict]], planned: dict[int, int | None]
) -> dict[str, Any]:
    """`rounds` of the longest run, `seconds` of all runs with evaluations."""
    end = common_round(curves.values())
    early, final, auc = (
        [measure(curve, -1 if end is None else end) for curve in curves.values()]
        for measure in (_early, _final, _mean_up_to)
    )
    done = {seed: max((r["round"] for r in records), default=0) for seed, records in data.items()}
    return {
        "accuracy_start": mean(curve.get(0) for curve in curves.values()),
        "accuracy_step10": mean(early),
        "accuracy_final": mean(final),
        "stderr": stderr(final),
        "interval": interval(final),
        "stderr_step10": stderr(early),
        "accuracy_per_seed_final": final,
        "area_under_curve": mean(auc),
        "round": end,
        "seeds": list(data),
        "last_evaluations": [max(curve, default=None) for curve in curves.values()],
        "rounds": max(sum(r["kind"] == "round" for r in records) for records in data.values()),
        "planned_rounds": max(present(planned.values()), default=None),
        "unfinished": {
            str(seed): [done[seed], planned[seed]]
            for seed in data
            if planned[seed] is not None and done[seed] < planned[seed]
        },
        "seconds": sum(r.get("seconds") or 0 for records in data.values() for r in records),
    }


def _difference(seeds: Seeds, reference: Seeds) -> dict[str, Any]:
    """Of each measure: mean, standard error, interval; of the final one also seed by seed."""
    if not seeds.keys() & reference.keys():
        return _unpaired(seeds, reference)
    curves = gains(seeds, reference)
    end = common_round(curves.values())
    values = {
        key: {seed: measure(curve, -1 if end is None else end) for seed, curve in curves.items()}
        for key, measure in MEASURES.items()
    }
    result: dict[str, Any] = {"paired": True, "seeds": len(seeds.keys() & reference.keys())}
    result |= {"round": end, "left_out": result["seeds"] - len(present(values["final"].values()))}
    for key, by_seed in values.items():
        found = {str(seed): value for seed, value in by_seed.items() if value is not None}
        result |= {key: mean(found.values()), f"{key}_stderr": stderr(found.values())}
        result |= {f"{key}_interval": interval(found.values()), f"{key}_per_seed": found}
    return result


def _unpaired(seeds: Seeds, reference: Seeds) -> dict[str, Any]:
    end = max(_reached(seeds.values()) & _reached(reference.values()), default=None)
    result: dict[str, Any] = {"paired": False, "seeds": 0, "round": end, "left_out": 0}
    for key, measure in MEASURES.items():
        own, other = (
            present(measure(curve, -1 if end is None else end) for curve in side.values())
            for side in (seeds, reference)
        )
        errors = [stderr(own), stderr(other)]
        result[key] = mean(own) - mean(other) if own and other else None
        result[f"{key}_stderr"] = (
            None if None in errors else (errors[0] ** 2 + errors[1] ** 2) ** 0.5
        )
        result |= {f"{key}_interval": welch_interval(own, other), f"{key}_per_seed": {}}
        result[f"{key}_counts"] = [len(own), len(other)]
    return result


def _planned(run: Any) -> int | None:
    """Rounds that the run's recipe asks for, where it has one."""
    train = read_recipe_of(run).get("train")
    rounds = train.get("rounds") if isinstance(train, dict) else None
    return rounds if isinstance(rounds, int) else None
