"""The charts against the position in the response: their metrics, axis labels and captions.

The paper's diagnostics (Fig. 1b, 3b, 3c, 4b) and others like them.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from matplotlib.figure import Figure

from iwopd_megatron.records.words import arm_name
from iwopd_megatron.report.axes import wrapped
from iwopd_megatron.report.captions import SHARE, Chart, Charts, cited, how_far, which_rounds
from iwopd_megatron.report.charts import band_chart, curves_of, pair_chart, trajectories_chart
from iwopd_megatron.report.data import REFERENCE, Curve, Runs, difference, is_zero, mean_curve
from iwopd_megatron.report.positions import (
    ALL,
    COMPARED,
    FIRST,
    LAST,
    by_position,
    compared_runs,
    is_compared,
    prefix_logp,
)

DECILE, TOKEN = "Position in the response (decile)", "Position in the response (token)"
LENGTH = "Length of the prefix (tokens)"
Drawn = tuple[Figure | None, str]


class Early(NamedTuple):
    """Kept samples of one early round, and whose they are: IW-OPD, round 1."""

    samples: list[dict]
    origin: str


def _at(runs: Runs, key: str, y_label: str, before: bool = False, scale: float = 1) -> Drawn:
    """Return a chart of a metric against the position, and of which rounds it is, in words.

    before: the first rounds against the last where most runs have both.
    """
    compared = before and is_compared(runs, key)
    part = LAST if compared else ALL
    runs = compared_runs(runs, key) if compared else runs
    curves = curves_of(runs, lambda records: by_position(records, key, part, scale))
    x_label = DECILE if key.endswith("_deciles") else TOKEN
    figure = band_chart(curves, x_label, y_label, _first(runs, key) if compared else None)
    return figure, f"{which_rounds(compared)}. {how_far(key)}"


def _first(runs: Runs, key: str) -> list[Curve]:
    """Return the curves of the first rounds of all runs."""
    found = curves_of(runs, lambda records: by_position(records, key, FIRST))
    return [curve for curves in found.values() for curve in curves]


def _made(name: str, drawn: Drawn, what: str, end: str = "") -> Charts:
    figure, text = drawn
    return {name: Chart(figure, f"{what}: {text} {end}".rstrip())} if figure else {}


def prefix_continuations(prefixes: dict[str, dict[str, Any]]) -> Charts:
    """Return a chart for each run: right answers against the share of the response continued from.

    prefixes: a run's name -> what `iwopd prefixes` wrote.
    """
    charts: Charts = {}
    for number, (name, found) in enumerate(prefixes.items()):
        curves = {}
        for who in ("teacher", "student"):
            points = {100 * p["fraction"]: p[who] for p in found["points"]}
            means = {x: 100 * point["mean"] for x, point in points.items()}
            intervals = [point["mean_interval"] for point in points.values()]
            bounds = [(100 * low, 100 * high) for low, high in intervals]
            curves[who] = means, bounds
        figure = pair_chart(curves, "Student's prefix (% of its response)", "Right answers (%)")
        figure.axes[0].set_title(wrapped(name), loc="right")
        figure.axes[0].set_ylim(0)
        text = (
            f"{name}: the student's responses are cut, and student and teacher go on from there. "
            "Their chance of a right answer, with 95 % bootstrap intervals over problems. "
        )
        file = "prefix_continuation" + (f"_{number}" if number else "")
        charts[file] = Chart(figure, text + cited("1b"))
    return charts


def reverse_kl_by_position(runs: Runs) -> Charts:
    """Return the chart of Fig. 3b."""
    drawn = _at(runs, "reverse_kl_positions", "Reverse KL (nats/token)", before=True)
    return _made("reverse_kl_by_position", drawn, "Reverse KL by position", cited("3b"))


def held_out_by_position(runs: Runs) -> Charts:
    """Return the chart of held-out answers: the first evaluation against the last."""
    key = "held_out_reverse_kl_positions"
    first = curves_of(runs, lambda records: by_position(records, key, slice(1)))
    last = curves_of(runs, lambda records: by_position(records, key, slice(-1, None)))
    dotted = [curve for curves in first.values() for curve in curves]
    label = "Held-out reverse KL (nats/token)"
    figure = band_chart(last, TOKEN, label, dotted, before_name="first evaluation")
    text = f"first evaluation of all runs (dotted), last of each arm (solid). {how_far(key)}"
    return _made("held_out_by_position", (figure, text), "Reverse KL of held-out answers")


def likelihood(runs: Runs) -> Charts:
    """Return charts of student's and teacher's likelihood of prefixes (Fig. 3c), and of the gap."""
    compared = is_compared(runs, "logp_positions")
    runs = compared_runs(runs, "logp_positions") if compared else runs
    part = FIRST if compared else ALL
    pairs = [prefix_logp(run, part) for arm in runs.values() for run in arm.values()]
    pairs = [pair for pair in pairs if pair[0]]
    if not pairs:
        return {}
    student, teacher = (mean_curve([pair[i] for pair in pairs]) for i in (0, 1))
    figure = pair_chart(
        {"student": (student, None), "teacher": (teacher, None)},
        LENGTH,
        "Log-likelihood of the prefix (nats)",
    )
    rounds = f"first {COMPARED} rounds" if compared else "all rounds"
    text = (
        "Log-probability of the first tokens of the student's responses, added up, under student "
        f"and teacher; mean over responses, {rounds} of all runs. A response that has ended stays "
        f"where it ended. {how_far('logp_positions')} {cited('3c')}"
    )
    part = LAST if compared else ALL
    last = curves_of(runs, lambda records: difference(*prefix_logp(records, part)))
    first = [difference(*pair) for pair in pairs] if compared else None
    gap = band_chart(last, LENGTH, "Teacher − student (nats)", first)
    gap_text = (
        f"The teacher's log-probability of the prefix minus the student's: "
        f"{which_rounds(compared)}. {how_far('logp_positions')}"
    )
    charts = {"prefix_likelihood": Chart(figure, text)}
    return charts | ({"prefix_likelihood_gap": Chart(gap, gap_text)} if gap else {})


def weights(runs: Runs, early: Early) -> Charts:
    """Return charts of token weights: of the arms by tenth, and of single responses (Fig. 4b)."""
    drawn = _at(runs, "weight_deciles", "Token weight (no unit)")
    is_there = any(arm.rpartition("/")[2] == REFERENCE for arm in runs)
    end = f"{arm_name(REFERENCE)} is 1 everywhere." if is_there else ""
    charts = _made("weight_by_position", drawn, "Token weight by tenth of the response", end)
    for rule, name in (("iw", "unsigned"), ("iw_signed", "signed")):
        lines = [s[f"weight_{rule}"] for s in early.samples if s.get(f"weight_{rule}")]
        figure = trajectories_chart(lines, f"Token weight, {name} (no unit)")
        if figure:
            text = f"Weights that {arm_name(rule)} would give single responses of {early.origin}. "
            if len(lines) > 1:
                text += f"Black: their mean, cut where fewer than {SHARE} of them go on. "
            charts[f"weight_{name}"] = Chart(figure, text + cited("4b"))
    return charts


def by_decile(runs: Runs) -> Charts:
    """Return charts of gap, entropy, drift and clipping by tenth of the response."""
    gap = _at(runs, "abs_gap_deciles", "|gap| (nats/token)", before=True)
    entropy = _at(runs, "entropy_deciles", "Student's entropy (nats/token)")
    drift = _at(runs, "drift_deciles", "Engine drift (nats/token)")
    charts = _made("gap_by_position", gap, "|teacher − student| log-probability of a token")
    charts |= _made("entropy_by_position", entropy, "Entropy of the student's next token")
    charts |= _made("drift_by_position", drift, "|trainer − rollout engine| log-probability")
    shares = {
        "clipped": ("Clipped tokens (%)", "Tokens whose policy ratio was clipped"),
        "tis_capped": ("Capped by truncated IS (%)", "Tokens whose importance weight was capped"),
    }
    for key, (label, what) in shares.items():
        if not is_zero(runs, key):
            drawn = _at(runs, f"{key}_deciles", label, scale=100)
            charts |= _made(f"{key}_by_position", drawn, what)
    return charts
