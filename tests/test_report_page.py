"""The report in a real browser: it renders at every width, asks nobody for anything, and reads.

Needs Debian's chromium (apt-get install chromium); skipped where there is none.
"""

import json
import re
import shutil
import subprocess
from html import unescape

import pytest
from test_report import (
    FIGURES,
    evaluation,
    training,
    write_comparison,
    write_run,
    write_scores,
)

from iwopd_megatron.records.runlog import append_event
from iwopd_megatron.report.data import find_runs, read_runs
from iwopd_megatron.report.figures import sections
from iwopd_megatron.report.figures_by_position import Early
from iwopd_megatron.report.page import write_report
from iwopd_megatron.report.pairs import PairGain

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
needs_browser = pytest.mark.skipif(
    CHROMIUM is None, reason="no chromium here: apt-get install chromium"
)
LONG = "a_name_that_somebody_chose_" * 3
PROBE = """<script>
addEventListener("load", () => {
  const colours = () => [...document.querySelectorAll(".tokens span")].map(
    span => getComputedStyle(span).backgroundColor);
  document.querySelectorAll("details").forEach(element => element.open = true);
  document.documentElement.style.width = "WIDTHpx";  // a window is never narrower than 500
  const outside = [...document.querySelectorAll("body *")].filter(e => !e.closest(".scroll *"));
  const images = [...document.images].map(image => ({
    alt: image.alt, natural: image.naturalWidth, shown: image.getBoundingClientRect().width}));
  const gap = colours();
  document.querySelectorAll("input.weight").forEach(input => input.click());
  const found = {images, gap, weight: colours(), text: document.body.innerText,
    right: Math.max(...outside.map(element => element.getBoundingClientRect().right)),
    cut: [...document.querySelectorAll("body *")].filter(e =>
      e.clientWidth && e.scrollWidth > e.clientWidth + 1).map(e => e.outerHTML.slice(0, 200)),
    cells: document.querySelectorAll("td").length,
    asked: performance.getEntriesByType("resource").map(entry => entry.name)};
  const element = document.createElement("script");
  element.type = "application/json";
  element.id = "found";
  element.textContent = JSON.stringify(found).replaceAll("<", "\\\\u003c");
  document.body.append(element);
});
</script>"""


def browse(page, folder, width):
    """What the probe found in a copy of the page, and the URLs that the page asked for."""
    copy, log = folder / "copy.html", folder / "net.json"
    copy.write_text(page.replace("</body>", PROBE.replace("WIDTH", str(width)) + "</body>"))
    command = [
        CHROMIUM,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        "--host-resolver-rules=MAP * ~NOTFOUND",
        f"--window-size={width},1200",
        f"--user-data-dir={folder / 'profile'}",
        f"--log-net-log={log}",
        "--dump-dom",
        copy.as_uri(),
    ]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=120).stdout
    found = re.search(r'<script type="application/json" id="found">(.*?)</script>', dom, re.S)
    assert found, dom[-2000:]
    return json.loads(unescape(found[1])), requests(json.loads(log.read_text())["events"])


def requests(events):
    """What a page asked the network for; the browser's own requests come from no origin."""
    settings = [event.get("params", {}) for event in events]
    return {
        one["url"]
        for one in settings
        if one.get("initiator", "not an origin") != "not an origin"
        and not one["url"].startswith(("file:", "data:"))
    }


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    folder = write_comparison(tmp_path_factory.mktemp("page") / "runs")
    sample = {"prompt": "a question", "response": "abc", "answer": "x", "correct": True}
    sample |= {"tokens": ["alpha", "beta", "gamma"] * 50, "gap": [-3.0, 0.0, 3.0] * 50}
    sample["weight"] = [1.5, 1.25, 1.0] * 50
    (folder / "iw" / "seed_0" / "samples").mkdir()
    file = folder / "iw" / "seed_0" / "samples" / "round_000005.jsonl"
    file.write_text(json.dumps(sample) + "\n")
    write_scores(folder / "iw" / "seed_0", "trained", aime24=0.5, aime25=0.4, **{LONG: 0.3})
    append_event(folder / "iw" / "seed_1", 3, "gate", f"{LONG} {LONG}")
    write_run(folder / LONG / "seed_0", [evaluation(0, 0.2), evaluation(20, 0.9)])
    return write_report(folder).read_text()


@needs_browser
@pytest.mark.parametrize("width", [1400, 768, 420])
def test_every_figure_is_shown_and_nothing_sticks_out(page, width, tmp_path):
    found, asked = browse(page, tmp_path, width)
    assert len(found["images"]) == len(FIGURES)
    for image in found["images"]:
        assert image["natural"] > 800 and 300 < image["shown"] <= width, image
    assert found["right"] <= width  # the page never scrolls sideways
    assert found["cells"] > 30 and found["cut"] == []  # nor does a part of it
    assert asked == set() and found["asked"] == []
    assert "IW-OPD" in found["text"] and "Optimiser" not in found["text"]  # that is in a picture


@needs_browser
def test_a_request_would_be_seen(page, tmp_path):
    """The check above can fail."""
    outside = '<img src="http://example.com/a.png"></body>'
    found, asked = browse(page.replace("</body>", outside), tmp_path, 1200)
    assert "http://example.com/a.png" in asked
    assert found["images"][-1]["natural"] == 0


@needs_browser
def test_an_opened_sample_is_coloured_by_gap_or_by_weight(page, tmp_path):
    found, _ = browse(page, tmp_path, 1200)
    blank = "rgba(0, 0, 0, 0)"
    low, none, high = found["gap"][:3]
    assert none == blank and low != high and blank not in (low, high)
    heavy, middle, light = found["weight"][:3]
    assert light == blank and blank not in (heavy, middle) and heavy != middle
    assert "alphabetagamma" in found["text"]


def test_every_axis_says_what_it_shows_and_in_which_unit(tmp_path):
    runs = read_runs(find_runs([write_comparison(tmp_path)]))
    runs["iw"][0].append(
        training(3, scored_early=0.5, time={"sync": 1.0}, entropy_deciles=[1.0] * 10)
    )
    point = {"mean": 0.5, "mean_interval": [0.4, 0.6]}
    prefixes = {"a": {"points": [{"fraction": 0.5, "student": point, "teacher": point}]}}
    samples = Early([{"weight_iw": [1.5, 1.0], "weight_iw_signed": [1.0, 1.5]}], "IW-OPD, round 1")
    pairs = {"iw": [PairGain(7.6, 2.0, [1.0, 3.0]), PairGain(2.3, 1.0, None)]}
    charts = {}
    for section in sections(runs, prefixes, samples, pairs):
        charts |= section.charts
    assert set(FIGURES) < set(charts)
    assert {"prefix_continuation", "weight_signed", "scored_early", "gain_by_compression"} <= set(
        charts
    )
    for name, chart in charts.items():
        (axes,) = chart.figure.axes
        assert re.search(r"\(.+\)|^Round$", axes.get_xlabel()), name
        if name != "phase_times":  # a bar an arm
            assert re.search(r"\(.+\)$", axes.get_ylabel()), name
