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
    Runs,
    difference,
    read_recipe_of,
    read_runs,
    series,
)
from iwopd_megatron.report.statistics import (
    interval,
    mean,
    mean_or_none,
    present,
    stderr_or_none,
    welch_interval,
)

Seeds = dict[int, Curve]  # seed -> accuracy at each evaluated round
Measure = Callable[[Curve, float], float | None]  # of a curve, up to a round
HELD_OUT = ("held_out_reverse_kl", "teacher_perplexity")
EARLY = 10  # the paper's early checkpoint


def summarise(paths: Paths) -> dict[str, Any]:
    """Return {"arms": {arm: ...}, "paired": {arm: ...}}, shares from 0 to 1, None where unknown.

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
    for arm, found in held_out(data).items():
        arms[arm] |= found
    paired = {
        arm: {"reference": other} | _difference(curves[arm], curves[other])
        for arm, other in references.items()
        if other is not None
    }
    return {"arms": arms, "paired": paired}


def held_out(data: Runs) -> dict[str, dict[str, float | None]]:
    """Return figures of held-out answers by arm: at the first and last evaluations of its seeds.

    X_start, X_final: means over seeds, X_stderr: of the last; X: the metrics of HELD_OUT.
    Arms without them are absent.
    """
    found: dict[str, dict[str, float | None]] = {}
    for arm, seeds in data.items():
        for key in HELD_OUT:
            curves = [series(records, "eval", key) for records in seeds.values()]
            ends = [(curve[min(curve)], curve[max(curve)]) for curve in curves if curve]
            if ends:
                first, last = zip(*ends, strict=True)
                found.setdefault(arm, {}).update(
                    {
                        f"{key}_start": mean(first),
                        f"{key}_final": mean(last),
                        f"{key}_stderr": stderr_or_none(last),
                    }
                )
    return found


def write_summary(out: Path, summary: dict[str, Any]) -> Path:
    """Write out/summary.json whole, and return its path."""
    path = out / "summary.json"
    write_whole(path, json.dumps(summary, indent=2, allow_nan=False) + "\n")
    return path


def reference_of(arm: str, arms: Iterable[str]) -> str | None:
    """Return OPD of the same folder, else the folder's first arm; None for that arm itself."""
    folder = arm.rpartition("/")[0]
    group = [other for other in arms if other.rpartition("/")[0] == folder]
    named = f"{folder}/{REFERENCE}" if folder else REFERENCE
    reference = named if named in group else group[0]
    return None if reference == arm else reference


def common_round(curves: Iterable[Curve]) -> float | None:
    """Return the latest round that at least half of the curves have, of those that have any."""
    return max(_reached(curves), default=None)


def far_enough(curves: list[Curve]) -> list[Curve]:
    """Return the curves that go as far as the round at which at least half are."""
    end = common_round(curves)
    return [curve for curve in curves if end in curve]


def _reached(curves: Iterable[Curve]) -> set[float]:
    kept = [curve for curve in curves if curve]
    rounds = {x for curve in kept for x in curve}
    return {x for x in rounds if 2 * sum(x in curve for curve in kept) >= len(kept)}


def gains(seeds: Mapping[int, Curve], reference: Mapping[int, Curve]) -> dict[int, Curve]:
    """Return seed -> round -> accuracy minus the reference's, of each seed both have."""
    found = {seed: difference(reference[seed], seeds[seed]) for seed in seeds if seed in reference}
    return {seed: curve for seed, curve in found.items() if curve}


def _final(curve: Curve, end: float) -> float | None:
    return curve.get(end)


def _early(curve: Curve, end: float) -> float | None:
    """Return the accuracy at the last evaluation after the start and up to round 10."""
    return curve.get(max((x for x in curve if 0 < x <= EARLY), default=-1))


def _mean_up_to(curve: Curve, end: float) -> float | None:
    return mean([y for x, y in curve.items() if x <= end]) if end in curve else None


MEASURES: dict[str, Measure] = {"final": _final, "auc": _mean_up_to, "step10": _early}


def _arm(
    curves: Seeds, data: dict[int, list[dict]], planned: dict[int, int | None]
) -> dict[str, Any]:
    """Return an arm's figures; `rounds` of the longest run, `seconds` of all, evaluations too."""
    end = common_round(curves.values())
    early, final, auc = (
        [measure(curve, -1 if end is None else end) for curve in curves.values()]
        for measure in (_early, _final, _mean_up_to)
    )
    done = {seed: max((r["round"] for r in records), default=0) for seed, records in data.items()}
    return {
        "accuracy_start": mean_or_none(curve.get(0) for curve in curves.values()),
        "accuracy_step10": mean_or_none(early),
        "accuracy_final": mean_or_none(final),
        "stderr": stderr_or_none(final),
        "interval": interval(final),
        "stderr_step10": stderr_or_none(early),
        "accuracy_per_seed_final": final,
        "area_under_curve": mean_or_none(auc),
        "round": end,
        "seeds": list(data),
        "last_evaluations": [max(curve, default=None) for curve in curves.values()],
        "rounds": max(sum(r["kind"] == "round" for r in records) for records in data.values()),
        "planned_rounds": max(present(planned.values()), default=None),
        "unfinished": {
            str(seed): [done[seed], asked]
            for seed, asked in planned.items()
            if asked is not None and done[seed] < asked
        },
        "seconds": sum(r.get("seconds") or 0 for records in data.values() for r in records),
    }


def _difference(seeds: Seeds, reference: Seeds) -> dict[str, Any]:
    """Return mean, standard error and interval of each measure, and its values seed by seed."""
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
        result |= {key: mean_or_none(found.values())}
        result |= {f"{key}_stderr": stderr_or_none(found.values())}
        result |= {f"{key}_interval": interval(found.values()), f"{key}_per_seed": found}
    return result


def _unpaired(seeds: Seeds, reference: Seeds) -> dict[str, Any]:
    """Return the same for arms without a common seed: differences of means, by Welch's test."""
    end = max(_reached(seeds.values()) & _reached(reference.values()), default=None)
    result: dict[str, Any] = {"paired": False, "seeds": 0, "round": end, "left_out": 0}
    for key, measure in MEASURES.items():
        own, other = (
            present(measure(curve, -1 if end is None else end) for curve in side.values())
            for side in (seeds, reference)
        )
        error, other_error = stderr_or_none(own), stderr_or_none(other)
        result[key] = mean(own) - mean(other) if own and other else None
        result[f"{key}_stderr"] = (
            None if error is None or other_error is None else (error**2 + other_error**2) ** 0.5
        )
        result |= {f"{key}_interval": welch_interval(own, other), f"{key}_per_seed": {}}
        result[f"{key}_counts"] = [len(own), len(other)]
    return result


def _planned(run: Any) -> int | None:
    """Return the rounds that the run's recipe asks for, where it has one."""
    train = read_recipe_of(run).get("train")
    rounds = train.get("rounds") if isinstance(train, dict) else None
    return rounds if isinstance(rounds, int) else None
