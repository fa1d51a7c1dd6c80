"""Write runs as one self-contained page: report.html, and its figures as figures/*.png."""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib.style
from jinja2 import Environment

from iwopd_megatron.files.run_files import read_object, read_records
from iwopd_megatron.records.runlog import read_events
from iwopd_megatron.records.samples import SAMPLE
from iwopd_megatron.records.words import arm_name
from iwopd_megatron.report.arms import arm_table
from iwopd_megatron.report.axes import STYLE
from iwopd_megatron.report.captions import reading
from iwopd_megatron.report.data import Paths, find_runs, read_runs
from iwopd_megatron.report.figures import ChartSection, sections
from iwopd_megatron.report.figures_by_position import Early
from iwopd_megatron.report.finding import findings
from iwopd_megatron.report.pairs import pair_gains
from iwopd_megatron.report.summary import summarise
from iwopd_megatron.report.tables import about, benchmarks_shown

READABLE = 4  # samples of a round that the page shows
TOKENS = 1500  # of a sample


def write_report(
    folders: Path | Sequence[Path], out: Path | None = None, title: str | None = None
) -> Path:
    """Write `out/report.html`, which refers to nothing outside, and `out/figures/*.png`.

    folders: runs, or folders of compared runs. out: default the only folder.
    """
    folders = [folders] if isinstance(folders, Path) else list(folders)
    out = out or folders[0]
    paths = find_runs(folders)
    runs = read_runs(paths)
    kept = _kept_samples(paths)
    with matplotlib.style.context(STYLE):
        made = sections(runs, _prefixes(paths), _early(kept), pair_gains(folders))
        images = _draw(made, out / "figures")
    summary = summarise(paths)
    recipe = next(iter(paths.values()))[0] / "recipe.yaml"
    template = Path(__file__).with_name("template.html").read_text("utf-8")
    names = ", ".join(folder.resolve().name for folder in folders)
    page = (
        Environment(autoescape=True)
        .from_string(template)
        .render(
            title=title or f"Report of {names}",
            name=arm_name,
            sections=made,
            images=images,
            about=about(paths),
            findings=findings(summary),
            arms=arm_table(summary),
            benchmarks=benchmarks_shown(paths),
            reading=reading(runs),
            events=_events(paths),
            samples=kept,
            tokens=TOKENS,
            readable=READABLE,
            recipe=recipe.read_text("utf-8", errors="replace") if recipe.exists() else "",
        )
    )
    partial = out / f".report.{os.getpid()}.html"  # renamed when whole
    partial.write_text(page, encoding="utf-8", errors="replace")
    os.replace(partial, out / "report.html")
    return out / "report.html"


def _draw(made: list[ChartSection], folder: Path) -> dict[str, str]:
    """Return file name -> base64 of the picture, written to the folder too; older ones go."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.png"):
        old.unlink()
    images = {}
    for section in made:
        for name, chart in section.charts.items():
            content = io.BytesIO()
            chart.figure.savefig(content, metadata={"Software": None})
            (folder / f"{name}.png").write_bytes(content.getvalue())
            images[name] = base64.b64encode(content.getvalue()).decode()
    return images


def _kept_samples(paths: Paths) -> dict[str, dict[int, list[dict]]]:
    """Return arm -> round -> its kept samples: the first seed's earliest and latest round."""
    kept: dict[str, dict[int, list[dict]]] = {}
    for arm, (first, *_) in paths.items():
        files = {int(file.stem.rpartition("_")[2]): file for file in first.glob("samples/*.jsonl")}
        chosen = sorted({min(files), max(files)}) if files else []
        kept[arm] = {number: read_records(files[number], SAMPLE) for number in chosen}
    return kept


def _early(kept: dict[str, dict[int, list[dict]]]) -> Early:
    """Return the earliest samples of IW-OPD, or else of any arm."""
    for arm in sorted(kept, key=lambda arm: arm.rpartition("/")[2] != "iw"):
        if kept[arm]:
            number = min(kept[arm])
            return Early(kept[arm][number], f"{arm_name(arm)}, round {number}")
    return Early([], "")


def _prefixes(paths: Paths) -> dict[str, dict[str, Any]]:
    """Return what `iwopd prefixes` wrote into runs, by a name of the run."""
    found = {}
    for arm, runs in paths.items():
        for run in runs:
            file = run / "prefixes.json"
            if file.exists():
                name = arm_name(arm)
                found[f"{name}, {run.name}" if len(runs) > 1 else name] = read_object(file)
    return found


def _events(paths: Paths) -> list[dict[str, Any]]:
    """Return all runs' events, each with its run's name."""
    return [
        {"run": f"{arm_name(arm)}, {run.name}"} | event
        for arm, runs in paths.items()
        for run in runs
        for event in read_events(run)
    ]
