"""Metrics against the position in the response, as far as enough responses reach.

Late positions are those of the few longest responses; their mean jumps and is of other responses
than the mean before. One rule for every such figure: a place counts while it has at least REACH of
the tokens of the fullest place.
"""

from __future__ import annotations

from collections.abc import Sequence

from iwopd_megatron.report.data import Curve, Runs

NEEDED = ("logp_positions", "reverse_kl_positions", "tokens_positions", "responses")
REACH = 0.25
COMPARED = 3  # rounds at the start, and at the end, that a figure compares
FIRST, LAST, ALL = slice(COMPARED), slice(-COMPARED, None), slice(None)


def places_reached(counts: Sequence[int]) -> list[int]:
    """Return indices of the places that enough responses reach."""
    fewest = REACH * max(counts, default=0)
    return [place for place, count in enumerate(counts) if count and count >= fewest]


def has_both_ends(records: list[dict], key: str) -> bool:
    """Return whether the first and the last rounds that have the metric are not the same."""
    return sum(bool(line.get(key)) for line in records) >= 2 * COMPARED


def is_compared(runs: Runs, key: str) -> bool:
    """Return whether at least half of the runs with the metric can be compared with their start."""
    found = [run for arm in runs.values() for run in arm.values() if any(r.get(key) for r in run)]
    return bool(found) and 2 * sum(has_both_ends(run, key) for run in found) >= len(found)


def compared_runs(runs: Runs, key: str) -> Runs:
    """Return the runs that can be compared with their start."""
    return {
        arm: {seed: run for seed, run in seeds.items() if has_both_ends(run, key)}
        for arm, seeds in runs.items()
    }


def by_position(records: list[dict], key: str, part: slice, scale: float = 1) -> Curve:
    """Return place -> mean over the tokens of some rounds, times `scale`.

    key: weight_deciles, for instance, whose places are 1 to 10, or weight_positions, whose places
    are the middle tokens of bins. part: the rounds, a slice of the records that have the metric.
    """
    kind = key.rpartition("_")[2]
    rows = [r for r in records if r.get(key) and r.get(f"tokens_{kind}")][part]
    total: dict[int, float] = {}
    counts = [0] * max((len(row[key]) for row in rows), default=0)
    for row in rows:
        for place, (value, count) in enumerate(zip(row[key], row[f"tokens_{kind}"], strict=True)):
            if value is not None and count:
                total[place] = total.get(place, 0.0) + value * count
                counts[place] += count
    width = (rows[0].get("bin_tokens") or 1) if rows and kind == "positions" else 1
    return {
        place * width + (width + 1) / 2: scale * total[place] / counts[place]
        for place in places_reached(counts)
    }


def prefix_logp(records: list[dict], part: slice) -> tuple[Curve, Curve]:
    """Return tokens of a prefix -> its log-likelihood in nats, under student and under teacher.

    Mean over responses; part: the rounds, a slice of the records that have what is needed.
    A response that is shorter counts with all its tokens. Linear, so bins' sums are all it takes.
    """
    rows = [r for r in records if all(r.get(key) for key in NEEDED)][part]
    if not rows:
        return {}, {}
    student, teacher = 0.0, 0.0
    curves: tuple[Curve, Curve] = {0: 0.0}, {0: 0.0}
    responses = sum(row["responses"] for row in rows)
    counts = [sum(column) for column in zip(*(r["tokens_positions"] for r in rows), strict=True)]
    for place in range(max(places_reached(counts), default=-1) + 1):
        for row in rows:
            logp, kl = row["logp_positions"][place], row["reverse_kl_positions"][place]
            count = row["tokens_positions"][place]
            student += count * (logp or 0) / responses
            teacher += count * ((logp or 0) - (kl or 0)) / responses
        end = (place + 1) * (rows[0].get("bin_tokens") or 1)
        curves[0][end], curves[1][end] = student, teacher
    return curves
