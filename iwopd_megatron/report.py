"""A run, or a folder of compared runs, as numbers and as one self-contained page.

An arm is a method, a run is one seed of it. Standard errors are over seeds; differences from OPD
are paired by seed: the same data order and the same start, so the seed's own noise cancels.
"""

import base64
import itertools
import os
import re
import statistics
from collections.abc import Callable, Iterable
from pathlib import Path

import matplotlib
import numpy as np
from jinja2 import Environment
from matplotlib.figure import Figure

from iwopd_megatron.errors import RecipeError
from iwopd_megatron.runlog import read_jsonl, read_metrics

Runs = dict[str, list[list[dict]]]  # arm -> the records of each seed
Reduce = Callable[[list[dict]], dict[int, float]]  # the records of a run -> x to y
ARM_NAMES = {"opd": "OPD", "iw": "IW-OPD"}
# Okabe-Ito for arms; Tol's light scheme for phases, so that no phase looks like an arm.
ARM_COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]
PHASE_COLOURS = ["#77AADD", "#EE8866", "#BBCC33", "#FFAABB", "#44BB99", "#EEDD88", "#99DDFF"]
CHART_STYLE = {
    "savefig.dpi": 200, "figure.constrained_layout.use": True, "legend.frameon": False,
    "axes.grid": True, "grid.alpha": 0.25, "axes.axisbelow": True, "lines.markersize": 4,
    "axes.spines.top": False, "axes.spines.right": False, "lines.linewidth": 1.8,
}  # fmt: skip


def _seed(run: Path) -> int:
    """From the folder name `seed_<n>`, else from the recipe, else 0."""
    recipe = run / "recipe.yaml"
    text = recipe.read_text() if recipe.exists() else ""
    found = re.search(r"seed_(\d+)$", run.name) or re.search(r"^\s*seed:\s*(\d+)\s*$", text, re.M)
    return int(found.group(1)) if found else 0


def find_runs(folder: Path) -> dict[str, list[Path]]:
    """Arm -> its run folders by seed: OPD and IW-OPD first, then the others by name."""
    if (folder / "metrics.jsonl").exists():
        return {folder.resolve().name: [folder]}
    runs: dict[str, list[Path]] = {}
    for path in folder.glob("*/seed_*/metrics.jsonl"):
        runs.setdefault(path.parent.parent.name, []).append(path.parent)
    if not runs:
        remedy = "give a folder with metrics.jsonl or <arm>/seed_<n>/metrics.jsonl in it"
        raise RecipeError(f"{folder} holds no run: {remedy}")
    ordered = sorted(runs, key=lambda arm: (arm != "opd", arm != "iw", arm))
    return {arm: sorted(runs[arm], key=_seed) for arm in ordered}


def _mean(values: Iterable[float | None]) -> float | None:
    kept = [value for value in values if value is not None]
    return sum(kept) / len(kept) if kept else None


def _stderr(values: Iterable[float | None]) -> float | None:
    """Sample standard deviation over sqrt(n); None for fewer than two values."""
    kept = [value for value in values if value is not None]
    return statistics.stdev(kept) / len(kept) ** 0.5 if len(kept) > 1 else None


def _series(records: list[dict], kind: str, key: str, scale: float = 1) -> dict[int, float]:
    """Round -> value times scale, for the records that have one."""
    found = [r for r in records if r["kind"] == kind and r.get(key) is not None]
    return {r["round"]: scale * r[key] for r in sorted(found, key=lambda r: r["round"])}


def _scores(records: list[dict]) -> dict[str, float | None]:
    """Accuracy at the start, by step 10, at the end, and its mean over the evaluations."""
    accuracy = _series(records, "eval", "accuracy")
    return {
        "start": accuracy.get(0),
        "step10": accuracy.get(max((r for r in accuracy if 0 < r <= 10), default=-1)),
        "final": accuracy.get(max(accuracy, default=-1)),
        "auc": _mean(accuracy.values()),
    }


def _summarise_arm(seeds: dict[int, list[dict]]) -> dict:
    """Means over seeds; `rounds` of the longest run, `seconds` of all runs with evaluations."""
    start, step10, final, auc = zip(*(_scores(run).values() for run in seeds.values()), strict=True)
    return {
        "accuracy_start": _mean(start),
        "accuracy_step10": _mean(step10),
        "accuracy_final": _mean(final),
        "stderr": _stderr(final),
        "stderr_step10": _stderr(step10),
        "accuracy_per_seed_final": list(final),
        "area_under_curve": _mean(auc),
        "seeds": list(seeds),
        "rounds": max(sum(r["kind"] == "round" for r in records) for records in seeds.values()),
        "seconds": sum(r.get("seconds") or 0 for records in seeds.values() for r in records),
    }


def _pair(seeds: dict[int, list[dict]], reference: dict[int, list[dict]]) -> dict:
    """Mean difference from the reference over the seeds both have, with its standard error."""
    pairs = [(_scores(seeds[s]), _scores(reference[s])) for s in seeds if s in reference]
    result: dict = {"seeds": len(pairs)}
    for key in ("final", "auc", "step10"):
        gains = [a[key] - b[key] for a, b in pairs if None not in (a[key], b[key])]
        result |= {key: _mean(gains), f"{key}_stderr": _stderr(gains)}
    return result


def summarise(runs: dict[str, list[Path]]) -> dict:
    """Accuracies per arm, and each arm's paired differences from `opd`; None where unknown."""
    data = {arm: {_seed(path): read_metrics(path) for path in runs[arm]} for arm in runs}
    paired = {a: _pair(data[a], data["opd"]) for a in data if a != "opd" and "opd" in data}
    return {"arms": {arm: _summarise_arm(data[arm]) for arm in data}, "paired": paired}


def _deciles(records: list[dict], key: str, window: slice) -> dict[int, float]:
    """Decile of the response -> mean over a window of rounds; empty deciles are left out."""
    rows = [record[key] for record in records if record.get(key)][window]
    means = [_mean(values) for values in zip(*rows, strict=True)]
    return {i: mean for i, mean in enumerate(means, start=1) if mean is not None}


def _plot(data: Runs, x_label: str, panels: dict[str, Reduce], sharey=False) -> Figure | None:
    """A panel per y label: the mean over seeds, +-1 SE shaded, and each seed as a thin line."""
    every_run = [run for runs in data.values() for run in runs]
    panels = {label: reduce for label, reduce in panels.items() if any(map(reduce, every_run))}
    if not panels:
        return None
    figure = Figure(figsize=(7.2, 3.6))
    grid = figure.subplots(1, len(panels), sharey=sharey, squeeze=False)[0]
    order = [*ARM_NAMES, *(arm for arm in data if arm not in ARM_NAMES)]
    for axes, (label, reduce) in zip(grid, panels.items(), strict=True):
        looks = itertools.cycle(itertools.product(["-", "--"], ARM_COLOURS))
        for arm, (dash, colour) in zip(order, looks, strict=False):
            runs = [line for line in map(reduce, data.get(arm, [])) if line]
            if not runs:
                continue
            xs = sorted(set.intersection(*map(set, runs)))  # a mean over fewer seeds would jump
            mean = np.array([_mean(run[x] for run in runs) for x in xs])
            error = np.array([_stderr(run[x] for run in runs) or 0.0 for x in xs])
            look = {"color": colour, "linestyle": dash, "marker": "o" if len(xs) <= 30 else None}
            axes.plot(xs, mean, label=ARM_NAMES.get(arm, arm), **look)
            axes.fill_between(xs, mean - error, mean + error, color=colour, alpha=0.18, lw=0)
            for run in runs:
                axes.plot(list(run), list(run.values()), dash, color=colour, alpha=0.5, lw=0.6)
        axes.set(xlabel=x_label, ylabel=label)
        axes.xaxis.get_major_locator().set_params(integer=True)
    figure.legend(*grid[0].get_legend_handles_labels(), loc="outside upper left", ncols=5)
    return figure


def _plot_phases(data: Runs) -> Figure | None:
    """Mean seconds a round spends in each phase; what the phases leave of the round is `other`."""
    timed = {arm: [r for run in data[arm] for r in run if r.get("time")] for arm in data}
    timed = {ARM_NAMES.get(arm, arm): rounds for arm, rounds in timed.items() if rounds}
    if not timed:
        return None
    figure = Figure(figsize=(7.2, 1.4 + 0.4 * len(timed)))
    axes, left = figure.subplots(), np.zeros(len(timed))
    wall = np.array([_mean(r.get("seconds") for r in rs) or 0.0 for rs in timed.values()])
    names = dict.fromkeys(name for rounds in timed.values() for r in rounds for name in r["time"])
    for name, colour in [*zip(names, itertools.cycle(PHASE_COLOURS)), ("other", "#DDDDDD")]:
        width = [sum(r["time"].get(name) or 0 for r in rs) / len(rs) for rs in timed.values()]
        width = np.maximum(wall - left, 0) if name == "other" else np.array(width)
        bars = axes.barh(list(timed), width, left=left, label=name, color=colour, ec="white")
        shown = [f"{w:.3g}" if w > 0.06 * max(wall) else "" for w in width]
        axes.bar_label(bars, shown, label_type="center", fontsize=8)
        left += width
    axes.set(xlabel="Mean time of a round (s)", ylim=(len(timed) - 0.5, -0.5))
    axes.grid(axis="y", visible=False)
    figure.legend(loc="outside upper left", ncols=6)
    return figure


def _figures(data: Runs) -> dict[str, Figure]:
    """File name -> figure; one whose data no run has is left out."""
    gaps: dict[str, Reduce] = {
        "|gap|, first 3 rounds (nats/token)": lambda r: _deciles(r, "gap_deciles", slice(3)),
        "|gap|, last 3 rounds (nats/token)": lambda r: _deciles(r, "gap_deciles", slice(-3, None)),
    }
    weight = {"Token weight (no unit)": lambda r: _deciles(r, "weight_deciles", slice(None))}
    health = {
        "Engine drift (nats/token)": lambda r: _series(r, "round", "drift"),
        "Response length (tokens)": lambda r: _series(r, "round", "response_length"),
    }
    services = {
        "Weight update (s)": lambda r: {n["round"]: n["time"]["sync"] for n in r if "time" in n},
        "Scored while generating (%)": lambda r: _series(r, "round", "scored_early", scale=100),
    }
    if not any("scored_early" in line for runs in data.values() for run in runs for line in run):
        services = {}
    accuracy = {"Accuracy (%)": lambda r: _series(r, "eval", "accuracy", scale=100)}
    reverse_kl = {"Reverse KL (nats/token)": lambda r: _series(r, "round", "reverse_kl")}
    figures = {
        "accuracy": _plot(data, "Optimiser step", accuracy),
        "gap_by_position": _plot(data, "Position in the response (decile)", gaps, sharey=True),
        "weight_by_position": _plot(data, "Position in the response (decile)", weight),
        "reverse_kl": _plot(data, "Round", reverse_kl),
        "phase_times": _plot_phases(data),
        "health": _plot(data, "Round", health),
        "services": _plot(data, "Round", services),
    }
    return {name: figure for name, figure in figures.items() if figure}


def write_report(folder: Path, title: str | None = None) -> Path:
    """Write `folder/report.html`, which refers to nothing outside, and `folder/figures/*.png`."""
    runs, images = find_runs(folder), {}
    data = {arm: [read_metrics(run) for run in paths] for arm, paths in runs.items()}
    (folder / "figures").mkdir(exist_ok=True)
    with matplotlib.rc_context(CHART_STYLE):
        for name, figure in _figures(data).items():
            image = folder / "figures" / f"{name}.png"
            figure.savefig(image, metadata={"Software": None})
            images[name] = base64.b64encode(image.read_bytes()).decode()
    samples = {}
    for arm, (first, *_) in runs.items():
        files = sorted(first.glob("samples/*.jsonl"), key=lambda path: (len(path.name), path.name))
        samples[arm] = read_jsonl(files[-1])[:2] if files else []
    recipe = next(iter(runs.values()))[0] / "recipe.yaml"
    last = {max(_series(run, "eval", "accuracy"), default=0) for a in data.values() for run in a}
    template = Path(__file__).with_name("report_template.html").read_text("utf-8")
    partial = folder / f".report.{os.getpid()}.html"  # renamed when whole
    partial.write_text(Environment(autoescape=True).from_string(template).render(
        title=title or f"Report of {folder.resolve().name}", names=ARM_NAMES, images=images,
        summary=summarise(runs), samples=samples, last_evals=sorted(last),
        recipe=recipe.read_text() if recipe.exists() else "",
    ), encoding="utf-8", errors="replace")  # fmt: skip
    os.replace(partial, folder / "report.html")
    return folder / "report.html"
