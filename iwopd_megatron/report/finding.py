"""What runs have shown, in plain words: the first lines of a report, from the table's numbers."""

from __future__ import annotations

from typing import Any

from iwopd_megatron.records.words import arm_name, counted, listed, percent, points
from iwopd_megatron.report.statistics import ENOUGH_SEEDS


def findings(summary: dict[str, Any]) -> list[str]:
    """Return a sentence for every arm but those that others are compared with, then caveats.

    summary: of `summary.summarise`.
    """
    arms, paired = summary["arms"], summary["paired"]
    references = {pair["reference"] for pair in paired.values()}
    found = [
        _compared(arm, paired[arm], arms) if arm in paired else _alone(arm, arms[arm])
        for arm in arms
        if arm not in references
    ]
    return found + _caveats(arms, paired)


def _compared(arm: str, pair: dict[str, Any], arms: dict[str, Any]) -> str:
    name, other = arm_name(arm), arm_name(pair["reference"])
    without = [a for a in (arm, pair["reference"]) if arms[a]["round"] is None]
    if without:
        return f"{name} cannot be compared with {other} yet: {_no_evaluation(without, arms)}."
    if pair["final"] is None:
        return f"{name} cannot be compared with {other} yet: they share no evaluated round."
    if pair["round"] == 0:
        return f"{name} cannot be compared with {other} yet: only their starts are evaluated."
    seeds, bounds = _seeds(pair), pair["final_interval"]
    difference = f"{name} {_verb(arm, pair, arms)} {_relation(pair, other)}"
    out = pair["left_out"]
    left_out = f"; {counted(out, 'seed')} left out, not as far" if out else ""
    if _smallest(pair) < ENOUGH_SEEDS:
        singles = _singles(pair["final_per_seed"]) if len(pair["final_per_seed"]) > 1 else ""
        return f"No difference can be told with {seeds}: {difference}{singles}{left_out}."
    span = f"95 % interval {percent(bounds[0])} to {percent(bounds[1])}"
    if bounds[0] <= 0 <= bounds[1]:
        return f"No difference can be told with {seeds}: {difference} ({span}{left_out})."
    return f"{difference} ({span}, {seeds}{left_out})."


def _alone(arm: str, row: dict[str, Any]) -> str:
    """Return the sentence of an arm that nothing is compared with."""
    name, final = arm_name(arm), row["accuracy_final"]
    if final is None:
        return f"{name}: {_no_evaluation([arm], {arm: row})}."
    if row["round"] == 0:
        return f"{name}: only its start is evaluated, with {percent(final)} % right answers."
    planned = row["planned_rounds"]
    where = "ended" if row["round"] >= (planned or 0) else f"is, at round {row['round']},"
    text = f"{name} {where} at {percent(final)} % right answers"
    start = row["accuracy_start"]
    if start is not None:
        text += f", from {percent(start)} % at its start"
    values = [value for value in row["accuracy_per_seed_final"] if value is not None]
    if len(values) >= ENOUGH_SEEDS:
        low, high = map(percent, row["interval"])
        return f"{text} (95 % interval {low} to {high}, {len(values)} seeds)."
    if len(values) == 2:
        return f"{text} (mean of 2 seeds: {' and '.join(map(percent, values))})."
    return f"{text} (1 seed, so its spread is unknown)."


def _no_evaluation(names: list[str], arms: dict[str, Any]) -> str:
    """Return why an accuracy is unknown."""
    who = " and ".join(
        f"{arm_name(a)} has {'no evaluation' if arms[a]['rounds'] else 'no finished round'}"
        for a in names
    )
    rounds = max(arms[a]["rounds"] for a in names)
    return who + (f" after {counted(rounds, 'round')}" if rounds else "")


def _verb(arm: str, pair: dict[str, Any], arms: dict[str, Any]) -> str:
    both = [arms[arm], arms[pair["reference"]]]
    planned = [row["planned_rounds"] or 0 for row in both]
    furthest = max([*planned, *(x or 0 for row in both for x in row["last_evaluations"])])
    ended = pair["round"] >= furthest
    return "ended" if ended else f"was, at round {pair['round']} of {furthest},"


def _relation(pair: dict[str, Any], other: str) -> str:
    difference, singles = pair["final"], pair["final_per_seed"].values()
    size = percent(abs(difference))
    if singles and not any(singles):
        return f"exactly level with {other}"
    if float(size) == 0:
        return f"within 0.05 points of {other}"
    side = "above" if difference > 0 else "below"
    return f"{size} {'point' if size == '1.0' else 'points'} {side} {other}"


def _smallest(pair: dict[str, Any]) -> int:
    return len(pair["final_per_seed"]) if pair["paired"] else min(pair["final_counts"])


def _seeds(pair: dict[str, Any]) -> str:
    if pair["paired"]:
        return counted(len(pair["final_per_seed"]), "seed")
    own, other = pair["final_counts"]
    return f"{own} against {counted(other, 'seed')}, none of them shared"


def _singles(per_seed: dict[str, float]) -> str:
    return " (" + ", ".join(f"seed {s}: {points(gain)}" for s, gain in per_seed.items()) + ")"


def _caveats(arms: dict[str, Any], paired: dict[str, Any]) -> list[str]:
    found = []
    tested = [pair for pair in paired.values() if _is_tested(pair)]
    if len(tested) > 1:
        found.append(
            f"Each of these {len(tested)} intervals stands for itself: where no arm differs, one "
            "in twenty still leaves out zero."
        )
    open_runs = [
        f"{arm_name(arm)} seed {seed} (round {done} of {planned})"
        for arm, row in arms.items()
        for seed, (done, planned) in row["unfinished"].items()
    ]
    if open_runs:
        found.append(f"Not finished: {listed(open_runs)}.")
    return found


def _is_tested(pair: dict[str, Any]) -> bool:
    return bool(pair["round"]) and pair["final"] is not None and _smallest(pair) >= ENOUGH_SEEDS
