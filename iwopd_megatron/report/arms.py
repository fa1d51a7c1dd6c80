"""The table of arms, the same in the terminal and on the page, and the note that explains it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from iwopd_megatron.records.words import (
    UNKNOWN,
    arm_name,
    common_name,
    counted,
    percent,
    plus_minus,
    points,
    points_interval,
)
from iwopd_megatron.report.statistics import ENOUGH_SEEDS
from iwopd_megatron.report.summary import EARLY

DISTANCES = {
    "held_out_reverse_kl": "Held-out reverse KL (nats/token)",
    "teacher_perplexity": "Teacher's perplexity of held-out answers",
}
GAINS = {"step10": "round 10", "final": "final", "auc": "mean of all evaluations"}


class Cell(NamedTuple):
    """A cell of a table: a figure, and in smaller letters what belongs to it."""

    text: str
    detail: str = ""


@dataclass(frozen=True)
class Table:
    """A table as text; each row has a cell for each heading."""

    headings: list[str]
    rows: list[list[Cell]]
    note: str


def arm_table(summary: dict[str, Any]) -> Table:
    """Return the table of arms; summary: of `summary.summarise`."""
    arms, paired = summary["arms"], summary["paired"]
    last = max((row["round"] or 0 for row in arms.values()), default=0)
    has_early = last > EARLY
    gains = {key: name for key, name in GAINS.items() if has_early or key != "step10"}
    early = ["Round 10 (%)"] * has_early
    headings = ["Arm", "Seeds", "Start (%)", *early, "Final (%)"]
    if paired:
        over = common_name(pair["reference"] for pair in paired.values())
        headings += [f"Gain over {over}, {name} (points)" for name in gains.values()]
    distances = {
        key: name
        for key, name in DISTANCES.items()
        if any(f"{key}_final" in row for row in arms.values())
    }
    headings += [*distances.values(), "Rounds", "Time (s)"]
    rows = []
    for arm, row in arms.items():
        cells = [
            Cell(arm_name(arm)),
            Cell(str(len(row["seeds"]))),
            Cell(percent(row["accuracy_start"])),
            *[Cell(plus_minus(row["accuracy_step10"], row["stderr_step10"]))] * has_early,
            Cell(plus_minus(row["accuracy_final"], row["stderr"]), _of_what(row, last)),
        ]
        if paired:
            cells += [_gain(paired.get(arm), key, last) for key in gains]
        seconds = f"{row['seconds']:,.0f}" if row["seconds"] else UNKNOWN
        cells += [_distance(row, key) for key in distances]
        rows.append([*cells, Cell(_rounds(row)), Cell(seconds)])
    note = _note(arms, paired, has_early)
    if distances:
        note += " Held-out figures: at the first and the last evaluation."
    return Table(headings, rows, note)


def _distance(row: dict[str, Any], key: str) -> Cell:
    """Return a held-out figure before and after."""
    if f"{key}_final" not in row:
        return Cell(UNKNOWN)
    error = row[f"{key}_stderr"]
    span = f"{row[f'{key}_start']:.3f} to {row[f'{key}_final']:.3f}"
    return Cell(span, "" if error is None else f"± {error:.3f}")


def _of_what(row: dict[str, Any], last: int) -> str:
    """Return of what a final accuracy is, where not of all seeds at the last round."""
    if row["round"] is None:
        return ""
    count = sum(value is not None for value in row["accuracy_per_seed_final"])
    parts = [f"at round {row['round']}"] if row["round"] < last else []
    parts += [f"{count} of {len(row['seeds'])} seeds"] if count < len(row["seeds"]) else []
    return ", ".join(parts)


def _gain(pair: dict[str, Any] | None, key: str, last: int) -> Cell:
    if pair is None or pair[key] is None:
        return Cell(UNKNOWN)
    single = pair[f"{key}_per_seed"]
    count = len(single) if pair["paired"] else min(pair[f"{key}_counts"])
    parts = []
    if count >= ENOUGH_SEEDS:
        parts.append(points_interval(pair[f"{key}_interval"]))
    elif len(single) == 2:
        parts.append("seeds " + ", ".join(map(points, single.values())))
    if key != "step10" and pair["round"] < last:
        parts.append(f"at round {pair['round']}")
    return Cell(points(pair[key]), ", ".join(parts))


def _rounds(row: dict[str, Any]) -> str:
    least = min([done for done, _ in row["unfinished"].values()], default=row["rounds"])
    span = f"{least} to {row['rounds']}" if least < row["rounds"] else str(row["rounds"])
    return f"{span} of {row['planned_rounds']}" if row["unfinished"] else span


def _note(arms: dict[str, Any], paired: dict[str, Any], has_early: bool) -> str:
    """Return what a reader must know of the table, and only of what it holds."""
    has_error = any(row["stderr"] is not None for row in arms.values())
    counts = {
        len(pair[f"{key}_per_seed"]) if pair["paired"] else min(pair[f"{key}_counts"])
        for pair in paired.values()
        for key in GAINS
        if pair[key] is not None
    }
    parts = ["Accuracy: right answers on the evaluation problems, in %."]
    if has_error:
        parts[0] = "Accuracy: right answers on the evaluation problems, in %, mean over seeds; " + (
            "± is one standard error over seeds."
        )
    if any(pair["paired"] for pair in paired.values()):
        over = common_name(pair["reference"] for pair in paired.values())
        parts.append(f"Gains against {over} are in points, seed by seed over the seeds of both.")
    if not all(pair["paired"] for pair in paired.values()):
        parts.append("Arms without a common seed are compared by their means (Welch).")
    if any(count >= ENOUGH_SEEDS for count in counts):
        parts.append("In brackets: 95 % intervals over seeds (Student's t).")
    if 2 in counts:
        parts.append(
            f"Two seeds give no useful interval (at 95 % it spans 12.7 standard errors each way), "
            f"so both are shown; run {counted(ENOUGH_SEEDS, 'seed')} or more for one."
        )
    if 1 in counts:
        parts.append("One seed has no interval.")
    if has_early:
        parts.append("Round 10: the last evaluation after the start and up to round 10.")
    parts.append("Time is summed over seeds, evaluations included.")
    return " ".join(parts)
