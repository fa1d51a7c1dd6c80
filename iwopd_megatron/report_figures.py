"""The figures of a report, section by section; the first six are the paper's own diagnostics."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from matplotlib.figure import Figure

from iwopd_megatron.report_captions import CAPTIONS
from iwopd_megatron.report_charts import (
    band_chart,
    curves_of,
    pair_chart,
    phase_chart,
    ratio_chart,
    trajectories_chart,
)
from iwopd_megatron.report_data import (
    REFERENCE,
    Curve,
    Runs,
    by_position,
    difference,
    gains,
    is_zero,
    keys_of,
    mean_curve,
    prefix_logp,
    series,
)
from iwopd_megatron.report_pairs import PairGain

FIRST, LAST, ALL = slice(3), slice(-3, None), slice(None)
STEP, ROUND = "Optimiser step", "Round"
DECILE, TOKEN = "Position in the response (decile)", "Position in the response (token)"
Charts = dict[str, Figure | None]  # file name -> figure, None where no run has the data


@dataclass(frozen=True)
class Section:
    """A heading, its charts, and what they show."""

    title: str
    caption: str
    charts: Charts


def sections(
    runs: Runs, prefixes: dict[str, dict], samples: list[dict], pairs: dict[str, list[PairGain]]
) -> list[Section]:
    """prefixes: a run's name -> what `iwopd prefixes` found; samples: kept ones of one round;
    pairs: `report_pairs.pair_gains`. Sections without data are left out.
    """
    charts = (
        {**_accuracy(runs), "gain_by_compression": ratio_chart(pairs)},
        _prefixes(prefixes),
        _reverse_kl(runs),
        _likelihood(runs),
        _weights(runs, samples),
        _by_decile(runs),
        _health(runs),
        _router(runs),
        _time(runs),
        _services(runs),
    )
    made = [
        Section(title, caption, {name: chart for name, chart in found.items() if chart})
        for (title, caption), found in zip(CAPTIONS.items(), charts, strict=True)
    ]
    return [section for section in made if section.charts]


def _over(runs: Runs, key: str, y_label: str, kind: str = "round", scale: float = 1) -> Any:
    """A metric against the rounds."""
    curves = curves_of(runs, lambda records: series(records, kind, key, scale))
    return band_chart(curves, STEP if kind == "eval" else ROUND, y_label)


def _at(runs: Runs, key: str, y_label: str, before: bool = False, scale: float = 1) -> Any:
    """A metric against the position in the response."""
    part = LAST if before else ALL
    curves = curves_of(runs, lambda records: by_position(records, key, part, scale))
    x_label = DECILE if key.endswith("_deciles") else TOKEN
    return band_chart(curves, x_label, y_label, _first(runs, key) if before else None)


def _first(runs: Runs, key: str) -> list[Curve]:
    """The first rounds of all runs."""
    found = curves_of(runs, lambda records: by_position(records, key, FIRST))
    return [curve for curves in found.values() for curve in curves]


def _accuracy(runs: Runs) -> Charts:
    charts = {"accuracy": _over(runs, "accuracy", "Accuracy (%)", "eval", 100)}
    for key in keys_of(runs, "accuracy_"):
        name = key.removeprefix("accuracy_")
        charts[re.sub(r"\W", "_", key)] = _over(runs, key, f"Right on {name} (%)", "eval", 100)
    if REFERENCE in runs and len(runs) > 1:
        found = {arm: gains(runs[arm], runs[REFERENCE]) for arm in runs if arm != REFERENCE}
        found = {arm: curves for arm, curves in found.items() if curves}
        charts["gain"] = band_chart(found, STEP, "Gain over OPD (points)", zero_line=True)
    return charts


def _prefixes(prefixes: dict[str, dict]) -> Charts:
    charts: Charts = {}
    for number, (name, found) in enumerate(prefixes.items()):
        curves = {}
        for who in ("teacher", "student"):
            points = {100 * p["fraction"]: p[who] for p in found["points"]}
            means = {x: 100 * point["mean"] for x, point in points.items()}
            bounds = [tuple(100 * b for b in point["mean_interval"]) for point in points.values()]
            curves[who] = means, bounds
        figure = pair_chart(curves, "Student's prefix (% of its response)", "Right answers (%)")
        figure.axes[0].set_title(name, loc="right")
        figure.axes[0].set_ylim(0)
        charts["prefix_continuation" + (f"_{number}" if number else "")] = figure
    return charts


def _reverse_kl(runs: Runs) -> Charts:
    label = "Reverse KL (nats/token)"
    return {
        "reverse_kl": _over(runs, "reverse_kl", label),
        "reverse_kl_by_position": _at(runs, "reverse_kl_positions", label, before=True),
    }


def _likelihood(runs: Runs) -> Charts:
    x_label = "Length of the prefix (tokens)"
    pairs = [prefix_logp(run, FIRST) for arm in runs.values() for run in arm.values()]
    pairs = [pair for pair in pairs if pair[0]]
    charts: Charts = {}
    if pairs:
        student, teacher = (mean_curve([pair[i] for pair in pairs]) for i in (0, 1))
        charts["prefix_likelihood"] = pair_chart(
            {"student": (student, None), "teacher": (teacher, None)},
            x_label,
            "Log-likelihood of the prefix (nats)",
        )
    last = curves_of(runs, lambda records: difference(*prefix_logp(records, LAST)))
    first = [difference(*pair) for pair in pairs]
    label = "Teacher − student (nats)"
    charts["prefix_likelihood_gap"] = band_chart(last, x_label, label, first)
    return charts


def _weights(runs: Runs, samples: list[dict]) -> Charts:
    label = "Token weight (no unit)"
    charts = {"weight_by_position": _at(runs, "weight_deciles", label)}
    for rule, name in (("iw", "unsigned"), ("iw_signed", "signed")):
        lines = [s[f"weight_{rule}"] for s in samples if s.get(f"weight_{rule}")]
        charts[f"weight_{name}"] = trajectories_chart(lines, f"Token weight, {name} (no unit)")
    return charts


def _by_decile(runs: Runs) -> Charts:
    charts = {
        "gap_by_position": _at(runs, "abs_gap_deciles", "|gap| (nats/token)", before=True),
        "entropy_by_position": _at(runs, "entropy_deciles", "Student's entropy (nats/token)"),
        "drift_by_position": _at(runs, "drift_deciles", "Engine drift (nats/token)"),
    }
    shares = {"clipped": "Clipped tokens (%)", "tis_capped": "Capped by truncated IS (%)"}
    for key, label in shares.items():
        if not is_zero(runs, key):
            charts[f"{key}_by_position"] = _at(runs, f"{key}_deciles", label, scale=100)
    return charts


def _health(runs: Runs) -> Charts:
    norm = _over(runs, "grad_norm", "Gradient norm (no unit)")
    if norm:
        norm.axes[0].set_yscale("log")
    return {
        "drift": _over(runs, "drift", "Engine drift (nats/token)"),
        "response_length": _over(runs, "response_length", "Response length (tokens)"),
        "truncated": _over(runs, "truncated", "Truncated responses (%)", scale=100),
        "grad_norm": norm,
    }


def _router(runs: Runs) -> Charts:
    return {
        "router_max": _over(runs, "router_max_over_mean", "Busiest / mean expert (no unit)"),
        "router_cv": _over(runs, "router_cv", "Coefficient of variation (no unit)"),
    }


def _time(runs: Runs) -> Charts:
    speed = _over(runs, "tokens_per_second", "Response tokens per second (1/s)")
    return {"phase_times": phase_chart(runs), "tokens_per_second": speed}


def _services(runs: Runs) -> Charts:
    if not any("scored_early" in r for arm in runs.values() for run in arm.values() for r in run):
        return {}
    sync = curves_of(
        runs, lambda rs: {r["round"]: r["time"]["sync"] for r in rs if "sync" in r.get("time", {})}
    )
    return {
        "weight_update": band_chart(sync, ROUND, "Weight update (s)"),
        "scored_early": _over(runs, "scored_early", "Scored while generating (%)", scale=100),
    }
