"""Charts of curves over arms and seeds. Each is one small picture, so that a page can wrap them."""

from __future__ import annotations

import itertools
import math
import textwrap
from collections.abc import Iterable, Mapping

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from iwopd_megatron.records.words import arm_name
from iwopd_megatron.report.data import Curve, Reduce, Runs
from iwopd_megatron.report.pairs import PairGain
from iwopd_megatron.report.positions import COMPARED, places_reached
from iwopd_megatron.report.statistics import mean, stderr
from iwopd_megatron.report.summary import far_enough

# Okabe-Ito for arms; Tol's light scheme for phases, so that no phase looks like an arm.
ARM_COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]
PHASE_COLOURS = ["#77AADD", "#EE8866", "#BBCC33", "#FFAABB", "#44BB99", "#EEDD88", "#99DDFF"]
FIXED = ("opd", "iw")  # always the first two colours
STUDENT, TEACHER, BEFORE = "#0072B2", "#E69F00", "#777777"
STYLE = {
    "savefig.dpi": 200, "figure.constrained_layout.use": True, "legend.frameon": False,
    "axes.grid": True, "grid.alpha": 0.25, "axes.axisbelow": True, "lines.markersize": 4,
    "axes.spines.top": False, "axes.spines.right": False, "lines.linewidth": 1.8,
    "font.size": 9.5, "legend.fontsize": 8.5, "legend.handlelength": 1.6,
    "legend.columnspacing": 1.2, "axes.titlesize": 9.5,
}  # fmt: skip
SIZE = 4.5, 3.1  # inches
ROUND = "Round"
SINGLE = 5  # runs of an arm that are still drawn one by one
NAME_WIDTH, HANDLE_WIDTH, LEGEND_WIDTH = 26, 5, 56  # characters


def new_chart(x_label: str, y_label: str, whole_steps: bool = True) -> tuple[Figure, Axes]:
    figure = Figure(figsize=SIZE)
    axes = figure.subplots()
    axes.set(xlabel=x_label, ylabel=y_label)
    if whole_steps:
        axes.xaxis.get_major_locator().set_params(integer=True)
    return figure, axes


def wrapped(name: str) -> str:
    """A long name on several lines."""
    return "\n".join(textwrap.wrap(name, NAME_WIDTH)) or name


def add_legend(figure: Figure, axes: Axes) -> None:
    """Above the axes, in as many columns as the names leave room for."""
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        labels = [wrapped(label) for label in labels]
        figure.legend(handles, labels, loc="outside upper left", ncols=_columns(labels))


def _columns(labels: list[str]) -> int:
    """Matplotlib fills a legend column by column, and each is as wide as its longest line."""
    widths = [max(map(len, label.split("\n"))) + HANDLE_WIDTH for label in labels]
    for columns in range(len(labels), 1, -1):
        if sum(max(part) for part in np.array_split(widths, columns)) <= LEGEND_WIDTH:
            return columns
    return 1


def looks(arms: Iterable[str]) -> dict[str, dict]:
    """Colour and dash of every arm, the same in all charts of a page."""
    order = [*FIXED, *(arm for arm in arms if arm not in FIXED)]
    styles = itertools.cycle(itertools.product(["-", "--"], ARM_COLOURS))
    return {
        arm: {"color": colour, "linestyle": dash}
        for arm, (dash, colour) in zip(order, styles, strict=False)
    }


def draw_band(axes: Axes, curves: list[Curve], label: str, look: dict, single: bool = True) -> None:
    """Mean over runs, +-1 SE shaded, a few runs as thin lines too; over what all runs have.

    Against rounds, runs that are not as far as half of them are thin lines only.
    """
    whole = far_enough(curves) if axes.get_xlabel() == ROUND else curves
    xs = sorted(set.intersection(*map(set, whole)))  # a mean over fewer seeds would jump
    middle = np.array([mean(curve[x] for curve in whole) for x in xs])
    error = np.array([stderr(curve[x] for curve in whole) or 0.0 for x in xs])
    axes.plot(xs, middle, label=label, marker="o" if len(xs) <= 12 else None, **look)
    axes.fill_between(xs, middle - error, middle + error, color=look["color"], alpha=0.18, lw=0)
    is_few = single and 1 < len(curves) <= SINGLE
    for curve in curves if is_few else [curve for curve in curves if curve not in whole]:
        axes.plot(list(curve), list(curve.values()), **look | {"alpha": 0.5, "lw": 0.6})


def curves_of(runs: Runs, reduce: Reduce) -> dict[str, list[Curve]]:
    """Arm -> curves, of the arms and runs that have one."""
    found = {arm: [curve for curve in map(reduce, runs[arm].values()) if curve] for arm in runs}
    return {arm: curves for arm, curves in found.items() if curves}


def band_chart(
    curves: Mapping[str, list[Curve]],
    x_label: str,
    y_label: str,
    before: list[Curve] | None = None,
    zero_line: bool = False,
    log: bool = False,
) -> Figure | None:
    """A line an arm; `before`, where given, as one grey line of all. None without data."""
    if not curves:
        return None
    figure, axes = new_chart(x_label, y_label)
    if zero_line:
        axes.axhline(0, color="#888888", lw=0.8)
    if before:
        look = {"color": BEFORE, "linestyle": ":"}
        draw_band(axes, before, f"first {COMPARED} rounds", look, single=False)
    styles = looks(curves)
    for arm in sorted(curves, key=list(styles).index):
        draw_band(axes, curves[arm], arm_name(arm), styles[arm])
    drawn = itertools.chain(before or [], *curves.values())
    lowest = min((y for curve in drawn for y in curve.values()), default=0)
    if log and lowest > 0:
        _log_scale(axes)
    elif lowest >= 0 and not zero_line:
        axes.set_ylim(bottom=max(0, axes.get_ylim()[0]))  # no scale of what cannot be
    add_legend(figure, axes)
    return figure


def _log_scale(axes: Axes) -> None:
    """With plain numbers, also between the powers of ten where there are few of these."""
    plain = FuncFormatter(lambda value, _: f"{value:g}")
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(plain)
    if max(axes.get_ylim()) < 100 * min(axes.get_ylim()):
        axes.yaxis.set_minor_formatter(plain)


def trajectories_chart(lines: list[list[float | None]], y_label: str) -> Figure | None:
    """Single responses as thin lines over their tokens; the mean of those that are as long."""
    if not lines:
        return None
    figure, axes = new_chart("Position in the response (token)", y_label)
    for number, line in enumerate(lines):
        label = None if number else "a response"
        known = [math.nan if value is None else value for value in line]
        axes.plot(range(1, len(line) + 1), known, color=STUDENT, alpha=0.35, lw=0.8, label=label)
    longest = max(map(len, lines))
    counts = [sum(t < len(line) for line in lines) for t in range(longest)]
    middle = {t + 1: mean(x[t] for x in lines if t < len(x)) for t in places_reached(counts)}
    if len(lines) > 1:
        label = f"mean of {len(lines)}"
        axes.plot(list(middle), list(middle.values()), color="black", label=label)
    add_legend(figure, axes)
    return figure


def pair_chart(
    curves: Mapping[str, tuple[Curve, list[tuple[float, float]] | None]], x_label: str, y_label: str
) -> Figure:
    """Student and teacher; with an interval (low, high) at each point where there are some."""
    figure, axes = new_chart(x_label, y_label, whole_steps=False)
    styles = {
        "student": {"color": STUDENT, "linestyle": "-"},
        "teacher": {"color": TEACHER, "linestyle": "--"},
    }
    for name, (curve, intervals) in curves.items():
        xs, ys = list(curve), list(curve.values())
        if intervals is None:
            axes.plot(xs, ys, label=name, **styles[name])
            continue
        errors = np.array([(y - a, b - y) for y, (a, b) in zip(ys, intervals, strict=True)]).T
        axes.errorbar(xs, ys, errors.clip(0), label=name, marker="o", capsize=3, **styles[name])
    add_legend(figure, axes)
    return figure


def ratio_chart(gains: Mapping[str, list[PairGain]]) -> Figure | None:
    """Gain over OPD against compression ratio, a line an arm, with intervals over seeds."""
    if not gains:
        return None
    label = "Teacher / student parameters (ratio)"
    figure, axes = new_chart(label, "Final gain over OPD (points)", whole_steps=False)
    axes.axhline(0, color="#888888", lw=0.8)
    styles = looks(gains)
    for arm, points in gains.items():
        ratios, ys, bounds = zip(*sorted(points, key=lambda point: point.ratio), strict=True)
        errors = [(y - b[0], b[1] - y) if b else (0, 0) for y, b in zip(ys, bounds, strict=True)]
        look = styles[arm] | {"label": arm_name(arm), "marker": "o", "capsize": 3}
        axes.errorbar(ratios, ys, np.array(errors).T.clip(0), **look)
    add_legend(figure, axes)
    return figure


def phase_chart(runs: Runs) -> Figure | None:
    """Mean seconds a round spends in each phase; what the phases leave of the round is `other`."""
    timed = {arm: [r for run in runs[arm].values() for r in run if r.get("time")] for arm in runs}
    timed = {wrapped(arm_name(arm)): rounds for arm, rounds in timed.items() if rounds}
    if not timed:
        return None
    figure = Figure(figsize=(SIZE[0], max(SIZE[1], 1.6 + 0.35 * len(timed))))
    axes, left = figure.subplots(), np.zeros(len(timed))
    wall = np.array([mean(r.get("seconds") for r in rs) or 0.0 for rs in timed.values()])
    names = dict.fromkeys(name for rounds in timed.values() for r in rounds for name in r["time"])
    for name, colour in [*zip(names, itertools.cycle(PHASE_COLOURS)), ("other", "#DDDDDD")]:
        width = [sum(r["time"].get(name) or 0 for r in rs) / len(rs) for rs in timed.values()]
        width = np.maximum(wall - left, 0) if name == "other" else np.array(width)
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
