"""The kinds of charts: bands of curves, single lines, student and teacher, ratios, phases.

Each is one small picture, so that a page can wrap them; axes.py has their axes, style and legend.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from iwopd_megatron.records.words import arm_name
from iwopd_megatron.report.axes import (
    BEFORE,
    PHASE_COLOURS,
    ROUND,
    SIZE,
    STUDENT,
    TEACHER,
    Look,
    add_legend,
    looks,
    new_chart,
    set_log_scale,
    wrapped,
)
from iwopd_megatron.report.data import Curve, Reduce, Runs
from iwopd_megatron.report.pairs import PairGain
from iwopd_megatron.report.positions import COMPARED, places_reached
from iwopd_megatron.report.statistics import mean, mean_or_none, stderr_or_none
from iwopd_megatron.report.summary import far_enough

SINGLE = 5  # runs of an arm that are still drawn one by one


def draw_band(axes: Axes, curves: list[Curve], label: str, look: Look, single: bool = True) -> None:
    """Draw the mean over runs with +-1 standard error shaded, over the points that all runs have.

    A few runs are thin lines besides, unless `single` is false. Against rounds, runs that are not
    as far as half of them are thin lines only.
    """
    color, linestyle = look
    whole = far_enough(curves) if axes.get_xlabel() == ROUND else curves
    xs = sorted(set.intersection(*map(set, whole)))  # a mean over fewer seeds would jump
    middle = np.array([mean([curve[x] for curve in whole]) for x in xs])
    error = np.array([stderr_or_none(curve[x] for curve in whole) or 0.0 for x in xs])
    marker = "o" if len(xs) <= 12 else None
    axes.plot(xs, middle, label=label, marker=marker, color=color, linestyle=linestyle)
    axes.fill_between(xs, middle - error, middle + error, color=color, alpha=0.18, lw=0)
    is_few = single and 1 < len(curves) <= SINGLE
    for curve in curves if is_few else [curve for curve in curves if curve not in whole]:
        xs, ys = list(curve), list(curve.values())
        axes.plot(xs, ys, color=color, linestyle=linestyle, alpha=0.5, lw=0.6)


def curves_of(runs: Runs, reduce: Reduce) -> dict[str, list[Curve]]:
    """Return arm -> curves of its runs, of the arms and runs that have one."""
    found = {arm: [curve for curve in map(reduce, runs[arm].values()) if curve] for arm in runs}
    return {arm: curves for arm, curves in found.items() if curves}


def band_chart(
    curves: Mapping[str, list[Curve]],
    x_label: str,
    y_label: str,
    before: list[Curve] | None = None,
    zero_line: bool = False,
    log: bool = False,
    before_name: str = f"first {COMPARED} rounds",
) -> Figure | None:
    """Return a chart with a line and its band for each arm, and `before` as one grey line of all.

    zero_line: a line at 0; log: a logarithmic y axis where all values are positive; before_name:
    of the grey line in the legend. None without data.
    """
    if not curves:
        return None
    figure, axes = new_chart(x_label, y_label)
    if zero_line:
        axes.axhline(0, color="#888888", lw=0.8)
    if before:
        draw_band(axes, before, before_name, BEFORE, single=False)
    styles = looks(curves)
    for arm in sorted(curves, key=list(styles).index):
        draw_band(axes, curves[arm], arm_name(arm), styles[arm])
    drawn = itertools.chain(before or [], *curves.values())
    lowest = min((y for curve in drawn for y in curve.values()), default=0)
    if log and lowest > 0:
        set_log_scale(axes)
    elif lowest >= 0 and not zero_line:
        axes.set_ylim(bottom=max(0, axes.get_ylim()[0]))  # no scale of what cannot be
    add_legend(figure, axes)
    return figure


def trajectories_chart(lines: list[list[float | None]], y_label: str) -> Figure | None:
    """Return a chart of single responses as thin lines over their tokens, and of their mean.

    lines: a value for each token, None where unknown. The mean is of those that are as long. None
    without data.
    """
    if not lines:
        return None
    figure, axes = new_chart("Position in the response (token)", y_label)
    for number, line in enumerate(lines):
        label = None if number else "a response"
        known = [math.nan if value is None else value for value in line]
        axes.plot(
            range(1, len(line) + 1), known, color=STUDENT.color, alpha=0.35, lw=0.8, label=label
        )
    longest = max(map(len, lines))
    counts = [sum(t < len(line) for line in lines) for t in range(longest)]
    if len(lines) > 1:
        reached = places_reached(counts)
        means = [mean_or_none(line[t] for line in lines if t < len(line)) for t in reached]
        middle = [math.nan if value is None else value for value in means]
        axes.plot([t + 1 for t in reached], middle, color="black", label=f"mean of {len(lines)}")
    add_legend(figure, axes)
    return figure


def pair_chart(
    curves: Mapping[str, tuple[Curve, list[tuple[float, float]] | None]], x_label: str, y_label: str
) -> Figure:
    """Return a chart of student and teacher.

    curves: "student" and "teacher" -> curve, and (low, high) at each of its points or None.
    """
    figure, axes = new_chart(x_label, y_label, whole_steps=False)
    styles = {"student": STUDENT, "teacher": TEACHER}
    for name, (curve, intervals) in curves.items():
        xs, ys, (color, linestyle) = list(curve), list(curve.values()), styles[name]
        if intervals is None:
            axes.plot(xs, ys, label=name, color=color, linestyle=linestyle)
            continue
        errors = np.array([(y - a, b - y) for y, (a, b) in zip(ys, intervals, strict=True)]).T
        axes.errorbar(
            xs,
            ys,
            errors.clip(0),
            label=name,
            marker="o",
            capsize=3,
            color=color,
            linestyle=linestyle,
        )
    add_legend(figure, axes)
    return figure


def ratio_chart(gains: Mapping[str, list[PairGain]]) -> Figure | None:
    """Return a chart of the gain over OPD against compression ratio, a line for each arm.

    With 95 % intervals over seeds where they are known. None without data.
    """
    if not gains:
        return None
    label = "Teacher / student parameters (ratio)"
    figure, axes = new_chart(label, "Final gain over OPD (points)", whole_steps=False)
    axes.axhline(0, color="#888888", lw=0.8)
    styles = looks(gains)
    for arm, points in gains.items():
        ratios, ys, bounds = zip(*sorted(points, key=lambda point: point.ratio), strict=True)
        errors = [(y - b[0], b[1] - y) if b else (0, 0) for y, b in zip(ys, bounds, strict=True)]
        axes.errorbar(
            ratios,
            ys,
            np.array(errors).T.clip(0),
            label=arm_name(arm),
            marker="o",
            capsize=3,
            color=styles[arm].color,
            linestyle=styles[arm].linestyle,
        )
    add_legend(figure, axes)
    return figure


def phase_chart(runs: Runs) -> Figure | None:
    """Return a chart of the mean seconds that a round spends in each phase, a bar for each arm.

    What the phases leave of the round is `other`. None without times.
    """
    timed = {arm: [r for run in runs[arm].values() for r in run if r.get("time")] for arm in runs}
    timed = {wrapped(arm_name(arm)): rounds for arm, rounds in timed.items() if rounds}
    if not timed:
        return None
    figure = Figure(figsize=(SIZE[0], max(SIZE[1], 1.6 + 0.35 * len(timed))))
    axes, left = figure.subplots(), np.zeros(len(timed))
    wall = np.array([mean_or_none(r.get("seconds") for r in rs) or 0.0 for rs in timed.values()])
    names = dict.fromkeys(name for rounds in timed.values() for r in rounds for name in r["time"])
    for name, colour in [*zip(names, itertools.cycle(PHASE_COLOURS)), ("other", "#DDDDDD")]:
        means = [sum(r["time"].get(name) or 0 for r in rs) / len(rs) for rs in timed.values()]
        width = np.maximum(wall - left, 0) if name == "other" else np.array(means)
        if not width.any():
            continue
        bars = axes.barh(list(timed), width, left=left, label=name, color=colour, ec="white")
        shown = [f"{w:.2g}" if w > 0.11 * max(wall) else "" for w in width]
        axes.bar_label(bars, shown, label_type="center", fontsize=8)
        left += width
    axes.set(xlabel="Mean time of a round (s)", ylim=(len(timed) - 0.5, -0.5))
    axes.grid(axis="y", visible=False)
    add_legend(figure, axes)
    return figure
