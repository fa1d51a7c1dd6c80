"""The report's numbers against values worked out by hand, and its page against hostile content."""

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from iwopd_megatron.report import find_runs, read_metrics, summarise, write_report


def evaluation(number: int, accuracy: float | None) -> dict:
    return {"kind": "eval", "round": number, "accuracy": accuracy, "problems": 8, "seconds": 1.0}


def training(number: int, **changes) -> dict:
    record = {
        "kind": "round", "round": number, "loss": 0.5, "gap": -0.2, "abs_gap": 0.4,
        "reverse_kl": 0.2, "weight": 1.25, "lr": 1e-5, "grad_norm": 1.0, "response_length": 90.0,
        "drift": 0.001, "gap_deciles": [0.5 - 0.04 * i for i in range(9)] + [None],
        "weight_deciles": [1.5 - 0.05 * i for i in range(10)], "seconds": 4.0,
        "time": {"generate": 2.0, "score": 0.5, "train": 1.0},
    }  # fmt: skip
    return record | changes


def write_run(folder: Path, records: list[dict], tail: str = "") -> Path:
    folder.mkdir(parents=True)
    text = "".join(json.dumps(record) + "\n" for record in records)
    (folder / "metrics.jsonl").write_text(text + tail)
    (folder / "recipe.yaml").write_text("run:\n  seed: 7\nname: a < b\n")
    return folder


def write_comparison(folder: Path) -> Path:
    """Final accuracies: OPD 0.4, 0.6 (seeds 0, 1); IW 0.5, 0.8, 0.9 (seeds 0, 1, 2)."""
    finals = {("opd", 0): 0.4, ("opd", 1): 0.6, ("iw", 0): 0.5, ("iw", 1): 0.8, ("iw", 2): 0.9}
    for (arm, seed), final in finals.items():
        records = [evaluation(0, 0.2), training(1), training(2)]
        records += [evaluation(5, 0.25), evaluation(8, 0.3 + 0.1 * seed), evaluation(20, final)]
        write_run(folder / arm / f"seed_{seed}", records)
    return folder


def test_find_runs_orders_arms_and_seeds(tmp_path):
    for name in ("linear/seed_0", "iw/seed_10", "iw/seed_9", "ablated/seed_0", "opd/seed_0"):
        write_run(tmp_path / name, [])
    runs = find_runs(tmp_path)
    assert list(runs) == ["opd", "iw", "ablated", "linear"]
    assert [run.name for run in runs["iw"]] == ["seed_9", "seed_10"]


def test_a_single_run_is_an_arm_of_one_seed(tmp_path):
    run = write_run(tmp_path / "first", [evaluation(0, 0.5), training(1), evaluation(1, 0.75)])
    assert find_runs(run) == {"first": [run]}
    summary = summarise(find_runs(run))
    arm = summary["arms"]["first"]
    assert (arm["seeds"], arm["accuracy_final"], arm["stderr"]) == ([7], 0.75, None)
    assert summary["paired"] == {}
    assert "figures" in {p.name for p in write_report(run).parent.iterdir()}


def test_a_folder_without_runs_says_what_to_give(tmp_path):
    with pytest.raises(ValueError, match=rf"{re.escape(str(tmp_path))}.*metrics\.jsonl"):
        find_runs(tmp_path)
    with pytest.raises(ValueError, match="holds no run"):
        write_report(tmp_path / "absent")


def test_means_and_standard_errors_over_seeds(tmp_path):
    arms = summarise(find_runs(write_comparison(tmp_path)))["arms"]
    opd, iw = arms["opd"], arms["iw"]
    assert opd["accuracy_start"] == pytest.approx(0.2)
    assert opd["accuracy_step10"] == pytest.approx((0.3 + 0.4) / 2)  # round 8, not 5 and not 20
    assert opd["stderr_step10"] == pytest.approx(0.05)
    assert opd["accuracy_final"] == pytest.approx(0.5)
    assert opd["stderr"] == pytest.approx(0.1)  # |0.6 - 0.4| / sqrt(2) / sqrt(2)
    assert opd["accuracy_per_seed_final"] == [0.4, 0.6]
    assert opd["area_under_curve"] == pytest.approx((1.15 / 4 + 1.45 / 4) / 2)
    assert iw["seeds"] == [0, 1, 2] and iw["rounds"] == 2
    assert iw["seconds"] == pytest.approx(3 * (2 * 4 + 4 * 1))


def test_differences_are_paired_by_seed(tmp_path):
    paired = summarise(find_runs(write_comparison(tmp_path)))["paired"]
    assert list(paired) == ["iw"]
    assert paired["iw"]["seeds"] == 2  # OPD has no seed 2
    assert paired["iw"]["final"] == pytest.approx((0.1 + 0.2) / 2)
    assert paired["iw"]["final_stderr"] == pytest.approx(0.05)
    assert paired["iw"]["auc"] == pytest.approx((0.025 + 0.05) / 2)
    assert paired["iw"]["step10"] == pytest.approx(0, abs=1e-12)


def test_unknown_numbers_are_null_not_nan(tmp_path):
    write_run(tmp_path / "opd" / "seed_0", [evaluation(0, 0.2), evaluation(20, math.nan)])
    write_run(tmp_path / "iw" / "seed_0", [training(1)])
    summary = summarise(find_runs(tmp_path))
    json.dumps(summary, allow_nan=False)
    assert summary["arms"]["opd"]["accuracy_step10"] is None
    assert summary["arms"]["opd"]["accuracy_final"] == 0.2
    assert summary["arms"]["iw"]["accuracy_final"] is None
    assert summary["paired"]["iw"]["final"] is None
    assert write_report(tmp_path).exists()


def test_a_torn_last_line_is_ignored_and_a_torn_middle_is_not(tmp_path):
    records = [training(1), training(2)]
    torn = write_run(tmp_path / "torn", records, tail='{"kind": "round", "rou')
    assert read_metrics(torn) == records
    mended = write_run(tmp_path / "mended", records, tail='{"kind": "rou\n{"kind": "eval"}\n')
    with pytest.raises(ValueError, match="record 3 is not JSON"):
        read_metrics(mended)


def test_a_run_before_its_first_record_still_has_a_page(tmp_path):
    page = write_report(write_run(tmp_path / "run", [])).read_text()
    assert "<img" not in page


def test_figures_without_data_are_left_out(tmp_path):
    sft = [{"kind": "round", "round": 1, "loss": 2.0, "lr": 1e-5, "grad_norm": 1.0}]
    write_report(write_run(tmp_path / "sft", [*sft, evaluation(0, 0.1), evaluation(1, 0.2)]))
    assert [p.name for p in (tmp_path / "sft" / "figures").iterdir()] == ["accuracy.png"]
    write_report(write_comparison(tmp_path / "both"))
    assert {p.stem for p in (tmp_path / "both" / "figures").iterdir()} == {
        "accuracy", "gap_by_position", "weight_by_position", "reverse_kl", "phase_times", "health",
    }  # fmt: skip


class Elements(HTMLParser):
    """Collects (tag, attributes) and the visible text of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data


def test_the_page_is_self_contained_and_shows_the_table(tmp_path):
    folder = write_comparison(tmp_path / "runs")
    page = write_report(folder, title="Mine & yours").read_text()
    elements = Elements(page)
    sources = [attrs["src"] for _, attrs in elements.tags if "src" in attrs]
    assert len(sources) == 6 and all(s.startswith("data:image/png;base64,") for s in sources)
    assert "http://" not in page and "https://" not in page
    assert not {"script", "link", "iframe"} & {tag for tag, _ in elements.tags}
    assert "Mine & yours" in elements.text and "name: a < b" in elements.text
    for cell in ("IW-OPD", "50.0 ± 10.0", "+15.0 ± 5.0"):
        assert f"<td>{cell}</td>" in page
    assert [p for p in folder.iterdir() if p.name.startswith(".")] == []  # no half-written page


def test_runs_at_different_steps_are_flagged(tmp_path):
    write_run(tmp_path / "opd" / "seed_0", [evaluation(0, 0.2), evaluation(20, 0.5)])
    late = write_run(tmp_path / "iw" / "seed_0", [evaluation(0, 0.2), evaluation(10, 0.4)])
    assert "not equally far" in write_report(tmp_path).read_text()
    (late / "metrics.jsonl").write_text(json.dumps(evaluation(20, 0.4)))
    assert "not equally far" not in write_report(tmp_path).read_text()


def test_samples_are_escaped_and_shaded(tmp_path):
    run = write_run(tmp_path / "run", [training(1)])
    hostile = "<script>alert(1)</script>"
    sample = {"prompt": hostile, "response": hostile, "answer": "<b>", "correct": False}
    sample |= {"tokens": [hostile, '" onclick="x', " c"], "gap": [-3.0, 0.1, None]}
    (run / "samples").mkdir()
    for name, weight in (("round_9", [9.0, 9.0, 9.0]), ("round_10", [1.5, 1.25, 1.0])):
        text = json.dumps(sample | {"weight": weight}) + "\n"
        (run / "samples" / f"{name}.jsonl").write_text(text)
    page = write_report(run).read_text()
    elements = Elements(page)
    spans = [attrs for tag, attrs in elements.tags if tag == "span"]
    assert "<script" not in page and elements.text.count(hostile) == 3
    assert [s["class"] for s in spans] == ["l9", "l0", "l0", "l9", "l4", "l0"]
    assert all(set(s) == {"class", "title"} for s in spans)
