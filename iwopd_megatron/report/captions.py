"""Captions of charts; made with the chart, so that a caption is of what is drawn."""

from __future__ import annotations

from typing import NamedTuple

from matplotlib.figure import Figure

from iwopd_megatron.records.words import PAPER
from iwopd_megatron.report.charts import SINGLE
from iwopd_megatron.report.data import Runs
from iwopd_megatron.report.positions import COMPARED, REACH

SHARE = f"{100 * REACH:.0f} %"


class Chart(NamedTuple):
    """A picture and its caption."""

    figure: Figure
    caption: str


Charts = dict[str, Chart]  # file name -> chart


def cited(figure: str) -> str:
    """Return a sentence that cites a figure of the paper by its number."""
    return f"As in Fig. {figure} of the paper ({PAPER})."


def which_rounds(is_compared: bool) -> str:
    """Return of which rounds a figure by position is."""
    if is_compared:
        return f"first {COMPARED} rounds of all runs (dotted), last {COMPARED} of each arm (solid)"
    return "mean over all rounds"


def how_far(key: str) -> str:
    """Return where a figure by position ends; key: the metric's."""
    if key.endswith("_deciles"):
        return f"Tenths with under {SHARE} of the tokens of the fullest one are left out."
    return f"Cut where fewer than {SHARE} of the responses go on: a few long ones would mislead."


def reading(runs: Runs) -> str:
    """Return how lines and bands of all charts are to be read; "" where all runs are single."""
    counts = [len(seeds) for seeds in runs.values()]
    if max(counts, default=0) < 2:
        return ""
    parts = ["line: mean over seeds", "band: ± 1 standard error"]
    if 2 in counts:
        parts[1] += " (of two seeds: from one to the other)"
    if any(1 < count <= SINGLE for count in counts):
        parts.append("thin: single seeds")
    text = "In the charts, " + "; ".join(parts) + "."
    if any(len({len(run) for run in seeds.values()}) > 1 for seeds in runs.values()):
        text += " Seeds that are not as far as half of their arm's are thin only, not in its mean."
    return text
