"""What all charts share: size, style, colours, axes with labels and scale, legend.

The labels of each chart's axes are in figures.py and figures_by_position.py.
"""

from __future__ import annotations

import itertools
import textwrap
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

# Okabe-Ito for arms; Tol's light scheme for phases, so that no phase looks like an arm.
ARM_COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]
PHASE_COLOURS = ["#77AADD", "#EE8866", "#BBCC33", "#FFAABB", "#44BB99", "#EEDD88", "#99DDFF"]
FIXED = ("opd", "iw")  # always the first two colours
STYLE = {
    "savefig.dpi": 200, "figure.constrained_layout.use": True, "legend.frameon": False,
    "axes.grid": True, "grid.alpha": 0.25, "axes.axisbelow": True, "lines.markersize": 4,
    "axes.spines.top": False, "axes.spines.right": False, "lines.linewidth": 1.8,
    "font.size": 9.5, "legend.fontsize": 8.5, "legend.handlelength": 1.6,
    "legend.columnspacing": 1.2, "axes.titlesize": 9.5,
}  # fmt: skip
SIZE = 4.5, 3.1  # inches
ROUND = "Round"
NAME_WIDTH, HANDLE_WIDTH, LEGEND_WIDTH = 26, 5, 56  # characters


class Look(NamedTuple):
    """Colour and dash of a line, as Matplotlib names them."""

    color: str
    linestyle: str


STUDENT, TEACHER = Look("#0072B2", "-"), Look("#E69F00", "--")
BEFORE = Look("#777777", ":")  # the first rounds, where a chart compares them with the last


def looks(arms: Iterable[str]) -> dict[str, Look]:
    """Return the look of every arm, the same in all charts of a page."""
    order = [*FIXED, *(arm for arm in arms if arm not in FIXED)]
    styles = itertools.cycle(itertools.product(["-", "--"], ARM_COLOURS))
    return {arm: Look(colour, dash) for arm, (dash, colour) in zip(order, styles, strict=False)}


def new_chart(x_label: str, y_label: str, whole_steps: bool = True) -> tuple[Figure, Axes]:
    """Return an empty chart with labelled axes; whole_steps: only whole numbers on the x axis."""
    figure = Figure(figsize=SIZE)
    axes = figure.subplots()
    axes.set(xlabel=x_label, ylabel=y_label)
    if whole_steps:
        axes.locator_params(axis="x", integer=True)
    return figure, axes


def set_log_scale(axes: Axes) -> None:
    """Make the y axis logarithmic, with plain numbers.

    They also stand between the powers of ten where there are few of these.
    """
    plain = FuncFormatter(lambda value, _: f"{value:g}")
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(plain)
    if max(axes.get_ylim()) < 100 * min(axes.get_ylim()):
        axes.yaxis.set_minor_formatter(plain)


def wrapped(name: str) -> str:
    """Return a long name on several lines."""
    return "\n".join(textwrap.wrap(name, NAME_WIDTH)) or name


def add_legend(figure: Figure, axes: Axes) -> None:
    """Put the legend above the axes, in as many columns as the names leave room for."""
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        labels = [wrapped(label) for label in labels]
        figure.legend(handles, labels, loc="outside upper left", ncols=_columns(labels))


def _columns(labels: list[str]) -> int:
    """Return how many columns fit.

    Matplotlib fills a legend column by column, and each is as wide as its longest line.
    """
    widths = [max(map(len, label.split("\n"))) + HANDLE_WIDTH for label in labels]
    for columns in range(len(labels), 1, -1):
        if sum(max(part) for part in np.array_split(widths, columns)) <= LEGEND_WIDTH:
            return columns
    return 1
