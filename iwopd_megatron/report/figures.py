"""Which charts a report has, section by section: their metrics, axis labels and captions.

figures_by_position.py has those against the position in the response; charts.py draws them, and
axes.py has their size, colours, scales and legend.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from matplotlib.figure import Figure

from iwopd_megatron.records.words import common_name
from iwopd_megatron.report.axes import ROUND
from iwopd_megatron.report.captions import Chart, Charts, cited
from iwopd_megatron.report.charts import band_chart, curves_of, phase_chart, ratio_chart
from iwopd_megatron.report.data import Runs, keys_of, series
from iwopd_megatron.report.figures_by_position import (
    Early,
    by_decile,
    held_out_by_position,
    likelihood,
    prefix_continuations,
    reverse_kl_by_position,
    weights,
)
from iwopd_megatron.report.pairs import PairGain
from iwopd_megatron.report.summary import gains, reference_of


@dataclass(frozen=True)
class ChartSection:
    """A heading of a report and its charts."""

    title: str
    charts: Charts


def sections(
    runs: Runs, prefixes: dict[str, dict], early: Early, pairs: dict[str, list[PairGain]]
) -> list[ChartSection]:
    """Return the sections of a report; those without charts, and charts without data, are absent.

    prefixes: a run's name -> what `iwopd prefixes` found; early: kept samples of one round; pairs:
    of `pairs.pair_gains`.
    """
    found = {
        "Accuracy": _accuracy(runs) | _by_compression(pairs),
        "Continuing from student prefixes": prefix_continuations(prefixes),
        "Reverse KL": _reverse_kl(runs) | reverse_kl_by_position(runs),
        "Held-out answers": _held_out(runs) | held_out_by_position(runs),
        "Likelihood of student prefixes": likelihood(runs),
        "Where the weight goes": weights(runs, early),
        "By position": by_decile(runs),
        "Health": _health(runs),
        "Load of the experts": _router(runs),
        "Time": _time(runs),
        "Services": _services(runs),
    }
    return [ChartSection(title, charts) for title, charts in found.items() if charts]


def drawn(charts: Mapping[str, tuple[Figure | None, str]]) -> Charts:
    """Return the charts that have a figure."""
    return {name: Chart(figure, text) for name, (figure, text) in charts.items() if figure}


def _over(
    runs: Runs, key: str, y_label: str, kind: str = "round", scale: float = 1
) -> Figure | None:
    """Return a chart of a metric against the rounds."""
    curves = curves_of(runs, lambda records: series(records, kind, key, scale))
    return band_chart(curves, ROUND, y_label)


def _accuracy(runs: Runs) -> Charts:
    is_ablation = bool({"prefix", "suffix"} & {arm.rpartition("/")[2] for arm in runs})
    text = f"Right answers on the evaluation problems. {cited('1a' if is_ablation else '2a')}"
    charts = {"accuracy": (_over(runs, "accuracy", "Accuracy (%)", "eval", 100), text)}
    for key in keys_of(runs, "accuracy_"):
        name = key.removeprefix("accuracy_")
        figure = _over(runs, key, f"Right on {name} (%)", "eval", 100)
        charts[re.sub(r"\W", "_", key)] = figure, f"Of them, the problems of {name}."
    return drawn(charts) | _gain(runs)


def _gain(runs: Runs) -> Charts:
    curves = {
        arm: {seed: series(records, "eval", "accuracy", 100) for seed, records in seeds.items()}
        for arm, seeds in runs.items()
    }
    references = {arm: other for arm in runs if (other := reference_of(arm, runs)) is not None}
    found = {
        arm: list(gains(curves[arm], curves[other]).values()) for arm, other in references.items()
    }
    found = {arm: lines for arm, lines in found.items() if lines}
    over = common_name(references[arm] for arm in found)
    figure = band_chart(found, ROUND, f"Gain over {over} (points)", zero_line=True)
    text = f"Accuracy minus that of {over}, seed by seed; above zero is better. {cited('2a')}"
    return drawn({"gain": (figure, text)})


def _by_compression(pairs: dict[str, list[PairGain]]) -> Charts:
    text = "Final gain of each pair of models against how much smaller the student is"
    if any(point.interval for points in pairs.values() for point in points):
        text += ", with 95 % intervals over seeds where there are three or more"
    return drawn({"gain_by_compression": (ratio_chart(pairs), f"{text}. {cited('2b')}")})


def _reverse_kl(runs: Runs) -> Charts:
    text = (
        "Mean student − teacher log-probability of the student's own tokens, an estimate of "
        f"KL(student ‖ teacher). {cited('3a')}"
    )
    return drawn({"reverse_kl": (_over(runs, "reverse_kl", "Reverse KL (nats/token)"), text)})


def _held_out(runs: Runs) -> Charts:
    kl = _over(runs, "held_out_reverse_kl", "Held-out reverse KL (nats/token)", "eval")
    perplexity = _over(runs, "teacher_perplexity", "Teacher's perplexity (no unit)", "eval")
    return drawn(
        {
            "held_out_reverse_kl": (
                kl,
                "Mean student − teacher log-probability of the student's answers to the evaluation "
                "problems, which it is not trained on.",
            ),
            "teacher_perplexity": (perplexity, "The teacher's perplexity of the same answers."),
        }
    )


def _health(runs: Runs) -> Charts:
    norms = curves_of(runs, lambda records: series(records, "round", "grad_norm"))
    norm = band_chart(norms, ROUND, "Gradient norm (no unit)", log=True)
    charts = {
        "drift": (
            _over(runs, "drift", "Engine drift (nats/token)"),
            "Mean |trainer − rollout engine| log-probability of the same tokens; ideally 0.",
        ),
        "response_length": (
            _over(runs, "response_length", "Response length (tokens)"),
            "Mean length of the round's responses.",
        ),
        "truncated": (
            _over(runs, "truncated", "Truncated responses (%)", scale=100),
            "Responses that were cut at the longest length allowed.",
        ),
        "grad_norm": (norm, "Norm of the gradient before it is clipped."),
    }
    return drawn(charts)


def _router(runs: Runs) -> Charts:
    charts = {
        "router_max": (
            _over(runs, "router_max_over_mean", "Busiest / mean expert (no unit)"),
            "Tokens of the busiest expert of the student over the mean; mean of layers; 1 is even.",
        ),
        "router_cv": (
            _over(runs, "router_cv", "Coefficient of variation (no unit)"),
            "Standard deviation over mean of the experts' tokens, mean over layers; 0 is even.",
        ),
    }
    return drawn(charts)


def _time(runs: Runs) -> Charts:
    charts = {
        "phase_times": (phase_chart(runs), _phases(runs)),
        "tokens_per_second": (
            _over(runs, "tokens_per_second", "Response tokens per second (1/s)"),
            "Of the whole round.",
        ),
        "peak_memory": (
            _over(runs, "peak_rss_gib", "Peak resident memory (GiB)"),
            "The most that a process of the trainer has had resident so far, on the host.",
        ),
    }
    return drawn(charts)


def _phases(runs: Runs) -> str:
    figure = phase_chart(runs)
    labels = figure.axes[0].get_legend_handles_labels()[1] if figure else []
    other = "; “other” is what the phases leave" if "other" in labels else ""
    return f"Mean seconds of each phase of a round{other}."


def _services(runs: Runs) -> Charts:
    if not any("scored_early" in r for arm in runs.values() for run in arm.values() for r in run):
        return {}
    sync = curves_of(
        runs,
        lambda rs: {r["round"]: r["time"]["sync"] for r in rs if "sync" in (r.get("time") or {})},
    )
    charts = {
        "weight_update": (
            band_chart(sync, ROUND, "Weight update (s)"),
            "Time to give the rollout servers new weights and prove that they have them.",
        ),
        "scored_early": (
            _over(runs, "scored_early", "Scored while generating (%)", scale=100),
            "Answers whose teacher scores were there when the round's last answer ended.",
        ),
    }
    return drawn(charts)
