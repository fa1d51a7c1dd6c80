"""The report's numbers against values worked out by hand, and its page against hostile content."""

import json
import math
import re
import statistics
from html.parser import HTMLParser
from pathlib import Path

import pytest

from iwopd_megatron.records.runlog import append_event, read_metrics
from iwopd_megatron.report.data import find_runs, read_runs, series
from iwopd_megatron.report.page import write_report
from iwopd_megatron.report.pairs import pair_gains
from iwopd_megatron.report.positions import by_position, prefix_logp
from iwopd_megatron.report.statistics import interval, welch_interval
from iwopd_megatron.report.summary import gains, summarise
from iwopd_megatron.report.tables import about, benchmark_table


def evaluation(number: int, accuracy: float | None) -> dict:
    return {"kind": "eval", "round": number, "accuracy": accuracy, "problems": 8, "seconds": 1.0}


def training(number: int, **changes) -> dict:
    record = {
        "kind": "round",
        "round": number,
        "loss": 0.5,
        "gap": -0.2,
        "abs_gap": 0.4,
        "reverse_kl": 0.2,
        "weight": 1.25,
        "lr": 1e-5,
        "grad_norm": 1.0,
        "response_length": 90.0,
        "drift": 0.001,
        "truncated": 0.0,
        "responses": 4,
        "bin_tokens": 2,
        "clipped": 0.0,
        "tokens_deciles": [4] * 9 + [0],
        "tokens_positions": [8, 6, 2, 0],
        "seconds": 4.0,
        "abs_gap_deciles": [0.5 - 0.04 * i for i in range(9)] + [None],
        "weight_deciles": [1.5 - 0.05 * i for i in range(9)] + [None],
        "reverse_kl_positions": [0.5, 1.0, 2.0, None],
        "logp_positions": [-1.0, -2.0, -3.0, None],
        "router_max_over_mean": 1.5,
        "router_cv": 0.25,
        "time": {"generate": 2.0, "score": 0.5, "train": 1.0},
    }
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
    runs = find_runs([tmp_path])
    assert list(runs) == ["opd", "iw", "ablated", "linear"]
    assert [run.name for run in runs["iw"]] == ["seed_9", "seed_10"]


def test_a_single_run_is_an_arm_of_one_seed(tmp_path):
    run = write_run(tmp_path / "first", [evaluation(0, 0.5), training(1), evaluation(1, 0.75)])
    assert find_runs([run]) == {"first": [run]}
    summary = summarise(find_runs([run]))
    arm = summary["arms"]["first"]
    assert (arm["seeds"], arm["accuracy_final"], arm["stderr"]) == ([7], 0.75, None)
    assert summary["paired"] == {}
    assert "figures" in {p.name for p in write_report(run).parent.iterdir()}


def test_a_folder_without_runs_says_what_to_give(tmp_path):
    with pytest.raises(ValueError, match=rf"{re.escape(str(tmp_path))}.*metrics\.jsonl"):
        find_runs([tmp_path])
    with pytest.raises(ValueError, match="holds no run"):
        write_report(tmp_path / "absent")


def test_means_and_standard_errors_over_seeds(tmp_path):
    arms = summarise(find_runs([write_comparison(tmp_path)]))["arms"]
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
    paired = summarise(find_runs([write_comparison(tmp_path)]))["paired"]
    assert list(paired) == ["iw"]
    assert paired["iw"]["seeds"] == 2  # OPD has no seed 2
    assert paired["iw"]["final"] == pytest.approx((0.1 + 0.2) / 2)
    assert paired["iw"]["final_stderr"] == pytest.approx(0.05)
    assert paired["iw"]["auc"] == pytest.approx((0.025 + 0.05) / 2)
    assert paired["iw"]["step10"] == pytest.approx(0, abs=1e-12)


def test_unknown_numbers_are_null_not_nan(tmp_path):
    write_run(tmp_path / "opd" / "seed_0", [evaluation(0, 0.2), evaluation(20, math.nan)])
    write_run(tmp_path / "iw" / "seed_0", [training(1)])
    summary = summarise(find_runs([tmp_path]))
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
    with pytest.raises(ValueError, match="line 3 is damaged: it is not JSON"):
        read_metrics(mended)


def test_a_run_before_its_first_record_still_has_a_page(tmp_path):
    page = write_report(write_run(tmp_path / "run", [])).read_text()
    assert "<img" not in page


def test_figures_without_data_are_left_out(tmp_path):
    sft = [{"kind": "round", "round": 1, "loss": 2.0, "lr": 1e-5, "grad_norm": 1.0}]
    write_report(write_run(tmp_path / "sft", [*sft, evaluation(0, 0.1), evaluation(1, 0.2)]))
    drawn = {p.name for p in (tmp_path / "sft" / "figures").iterdir()}
    assert drawn == {"accuracy.png", "grad_norm.png"}
    write_report(write_comparison(tmp_path / "both"))
    assert {p.stem for p in (tmp_path / "both" / "figures").iterdir()} == FIGURES


FIGURES = {
    "accuracy",
    "gain",
    "reverse_kl",
    "reverse_kl_by_position",
    "prefix_likelihood",
    "prefix_likelihood_gap",
    "weight_by_position",
    "gap_by_position",
    "drift",
    "response_length",
    "truncated",
    "grad_norm",
    "router_max",
    "router_cv",
    "phase_times",
}


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
    assert len(sources) == len(FIGURES) and all(
        s.startswith("data:image/png;base64,") for s in sources
    )
    assert "http://" not in page and "https://" not in page
    assert not {"script", "iframe"} & {tag for tag, _ in elements.tags}
    assert [attrs["href"] for tag, attrs in elements.tags if tag == "link"] == ["data:,"]
    assert "Mine & yours" in elements.text and "name: a < b" in elements.text
    for cell in ("IW-OPD", "50.0 ± 10.0", "+15.0 <small>seeds +10.0, +20.0</small>"):
        assert f"<span>{cell}</span></td>" in page
    assert [p for p in folder.iterdir() if p.name.startswith(".")] == []  # no half-written page


def test_samples_are_escaped_and_shaded(tmp_path):
    run = write_run(tmp_path / "run", [training(1)])
    hostile = "<script>alert(1)</script>"
    sample = {"prompt": hostile, "response": hostile, "answer": hostile, "correct": False}
    sample |= {"tokens": [hostile, '" onclick="x', " c"], "gap": [-3.0, 0.1, None]}
    (run / "samples").mkdir()
    for name, weight in (("round_9", [9.0, 9.0, 9.0]), ("round_10", [1.5, 1.25, 1.0])):
        text = json.dumps(sample | {"weight": weight}) + "\n"
        (run / "samples" / f"{name}.jsonl").write_text(text)
    page = write_report(run).read_text()
    elements = Elements(page)
    spans = [attrs for tag, attrs in elements.tags if tag == "span" and attrs]
    assert "<script" not in page and elements.text.count(hostile) == 6
    early, late = spans[:3], spans[3:]
    assert [s["class"] for s in early] == ["n9 w0", "p0 w0", "p0 w0"]
    assert [s["class"] for s in late] == ["n9 w9", "p0 w4", "p0 w0"]
    assert late[1]["title"] == "+0.10 nats, 1.25 times"
    assert all(set(s) == {"class", "title"} for s in spans)


def test_several_folders_make_one_page(tmp_path):
    first, second = (write_comparison(tmp_path / name) for name in ("a", "b"))
    single = write_run(tmp_path / "mine", [evaluation(0, 0.1), evaluation(20, 0.9)])
    runs = find_runs([first, second, single, first])
    assert set(runs) == {"a/opd", "a/iw", "b/opd", "b/iw", "mine"}
    assert len(runs["a/iw"]) == 3  # given twice, there once
    page = write_report([first, second, single], out=tmp_path / "page")
    assert page == tmp_path / "page" / "report.html"
    names = ("OPD (a)", "IW-OPD (a)", "OPD (b)", "IW-OPD (b)", "mine")
    assert all(f"<span>{name}</span></td>" in page.read_text() for name in names)
    paired = summarise(runs)["paired"]
    assert {arm: pair["reference"] for arm, pair in paired.items()} == {
        "a/iw": "a/opd",
        "b/iw": "b/opd",
    }


def test_folders_that_share_one_arm_keep_all_their_arms_together(tmp_path):
    for name in ("a/opd", "a/iw", "b/opd", "b/prefix", "x/a/opd"):
        write_run(tmp_path / name / "seed_0", [])
    found = find_runs([tmp_path / "a", tmp_path / "b"])
    assert list(found) == ["a/opd", "a/iw", "b/opd", "b/prefix"]
    same = find_runs([tmp_path / "a", tmp_path / "x" / "a"])  # two folders of one name
    assert {len(runs) for runs in same.values()} == {1} and len(same) == 3


def write_pair(folder: Path, teacher: str, student: str) -> Path:
    write_comparison(folder)
    for recipe in folder.glob("*/*/recipe.yaml"):
        recipe.write_text(f"student: {{hf: models/{student}}}\nteacher: {{hf: models/{teacher}}}\n")
    return folder


def test_gains_against_compression_over_pairs_of_models(tmp_path):
    large, small = "Qwen3-30B-A3B-Instruct-2507", "Qwen3-4B-Instruct-2507"
    first = write_pair(tmp_path / "a", large, "Qwen3-4B")
    second = write_pair(tmp_path / "b", small, "Qwen3-1.7B")
    found = pair_gains([first, second, write_comparison(tmp_path / "c")])  # c names no models
    assert list(found) == ["iw"]
    assert [round(point.ratio, 1) for point in found["iw"]] == [7.6, 2.3]  # 30.5 / 4.0, 4.0 / 1.7
    assert [point.gain for point in found["iw"]] == pytest.approx([15, 15])
    assert found["iw"][0].interval is None  # two seeds
    for folder in (first, second):
        write_run(folder / "opd" / "seed_2", [evaluation(0, 0.2), evaluation(20, 0.6)])
    wide = pair_gains([first, second])["iw"][0]  # gains of 10, 20 and 30
    assert wide.interval == pytest.approx([20 - 4.303 * 10 / 3**0.5, 20 + 4.303 * 10 / 3**0.5])
    assert pair_gains([first]) == {}  # one ratio is no curve
    page = write_report([first, second], out=tmp_path / "page")
    assert (page.parent / "figures/gain_by_compression.png").exists()


def test_runs_of_a_comparison_may_be_given_one_by_one(tmp_path):
    folder = write_comparison(tmp_path / "runs")
    given = [folder / "opd" / "seed_0", folder / "iw" / "seed_0", folder / "iw" / "seed_1"]
    assert {arm: len(runs) for arm, runs in find_runs(given).items()} == {"opd": 1, "iw": 2}
    assert summarise(find_runs(given))["paired"]["iw"]["final"] == pytest.approx(0.1)


def test_means_by_position_weigh_the_rounds_by_their_tokens():
    rounds = [
        training(1, tokens_deciles=[1, 0], weight_deciles=[2.0, None]),
        training(2, tokens_deciles=[3, 1], weight_deciles=[1.0, 4.0]),
    ]
    assert by_position(rounds, "weight_deciles", slice(None)) == {1: 1.25, 2: 4.0}
    assert by_position(rounds, "weight_deciles", slice(1)) == {1: 2.0}
    # Bins of two tokens have their middle at 1.5, 3.5, ...; the last one is empty.
    expected = {1.5: 0.5, 3.5: 1.0, 5.5: 2.0}
    assert by_position(rounds, "reverse_kl_positions", slice(None)) == expected
    rare = [training(1, tokens_positions=[100, 90, 24, 0])]
    assert list(by_position(rare, "reverse_kl_positions", slice(None))) == [1.5, 3.5]


def test_places_that_few_responses_reach_are_cut_by_one_rule():
    """A quarter of the tokens of the fullest place, wherever that is."""
    few = training(1, tokens_positions=[90, 100, 25, 24], logp_positions=[-1.0] * 4)
    few |= {"reverse_kl_positions": [1.0] * 4, "tokens_deciles": [8] * 8 + [2, 1]}
    few["weight_deciles"] = [1.0] * 10
    assert list(by_position([few], "reverse_kl_positions", slice(None))) == [1.5, 3.5, 5.5]
    assert list(by_position([few], "weight_deciles", slice(None))) == list(range(1, 10))
    student, _ = prefix_logp([few], slice(None))
    assert max(student) == 6


def test_prefix_likelihood_is_the_mean_over_responses():
    """Four responses: -1 a token in the first bin's 8 tokens, -2 in 6, -3 in 2."""
    student, teacher = prefix_logp([training(1), training(2)], slice(None))
    assert student == pytest.approx({0: 0, 2: -2, 4: -5, 6: -6.5})
    assert teacher == pytest.approx({0: 0, 2: -2 - 1, 4: -5 - 2.5, 6: -6.5 - 3.5})


def test_gains_are_of_the_same_seed_and_step(tmp_path):
    runs = read_runs(find_runs([write_comparison(tmp_path)]))
    own, other = (
        {seed: series(records, "eval", "accuracy", 100) for seed, records in runs[arm].items()}
        for arm in ("iw", "opd")
    )
    assert gains(own, other) == {
        seed: {0: 0, 5: 0, 8: 0, 20: pytest.approx(gain)} for seed, gain in ((0, 10), (1, 20))
    }


def test_intervals_are_those_of_student():
    assert interval([1.0, 2.0, 3.0]) == pytest.approx([2 - 2.4841, 2 + 2.4841], abs=1e-3)
    assert interval([1.0]) is None and interval([]) is None
    values = [float(i % 5) for i in range(21)]  # 20 degrees of freedom: t = 2.086
    low, high = interval(values)
    assert (high - low) / 2 == pytest.approx(2.086 * statistics.stdev(values) / 21**0.5, rel=1e-3)


def test_arms_without_a_common_seed_are_compared_by_welch():
    """Means 4 and 1; variances 4 of three and 1 of three: error sqrt(5/3), 2.94 -> 2 degrees."""
    low, high = welch_interval([2.0, 4.0, 6.0], [0.0, 1.0, 2.0])
    half = 4.303 * (5 / 3) ** 0.5
    assert (low, high) == (pytest.approx(3 - half), pytest.approx(3 + half))
    assert welch_interval([1.0], [1.0, 2.0]) is None
    assert welch_interval([1.0, 1.0], [0.5, 0.5]) == [0.5, 0.5]


def write_scores(run, place, **means):
    folder = run / "eval" / place
    folder.mkdir(parents=True)
    scores = {
        name: {"mean": mean, "mean_interval": [mean - 0.1, mean + 0.1], "samples": 32}
        for name, mean in means.items()
    }
    (folder / "results.json").write_text(json.dumps({"benchmarks": scores}))


def test_the_papers_numbers_stand_beside_the_runs(tmp_path):
    folder = write_comparison(tmp_path / "runs")
    pair = "teacher: {hf: /m/Qwen3-30B-A3B-Instruct-2507}\nstudent: {hf: /m/Qwen3-4B}\n"
    (folder / "opd" / "seed_0" / "recipe.yaml").write_text(pair)
    write_scores(folder / "opd" / "seed_0", "trained", aime25=0.5)
    write_scores(folder / "iw" / "seed_0", "round_000010", aime25=0.4, own=0.2)
    write_scores(folder / "iw" / "seed_1", "round_000010", aime25=0.6)
    table = benchmark_table(find_runs([folder]))
    assert table["names"][:2] == ["aime25", "own"]
    assert table["own"]["OPD, final"]["aime25"]["interval"] == pytest.approx([0.4, 0.6])
    pooled = table["own"]["IW-OPD, round 10"]["aime25"]
    assert (pooled["score"], pooled["error"]) == (pytest.approx(0.5), pytest.approx(0.1))
    assert table["paper"]["IW-OPD, step 10"]["aime25"] == pytest.approx(0.493)
    assert table["paper"]["IW-ExOPD, final"]["hmmt25"] == pytest.approx(0.32)
    page = write_report(folder).read_text()
    assert "<span>Paper: IW-OPD, step 10</span>" in page and "<span>49.3</span>" in page
    assert "50.0 <small>[40.0, 60.0]</small>" in page and "<span>50.0 ± 10.0</span>" in page
    assert "IW-OPD, arXiv 2606.22600" in page


def test_another_pair_has_no_numbers_of_the_paper(tmp_path):
    assert benchmark_table(find_runs([write_comparison(tmp_path)])) is None


def test_the_page_says_what_the_runs_have_in_common(tmp_path):
    assert about(find_runs([write_run(tmp_path / "bare", [])])) == ""
    for name, rule in (("opd", "uniform"), ("iw", "iw"), ("mine", "iw")):
        run = write_run(tmp_path / "runs" / name / "seed_1", [])
        (run / "recipe.yaml").write_text(
            f"student: {{hf: s}}\nteacher: {{hf: t}}\nloss: {{weighting: {{rule: {rule}}}}}\n"
        )
    assert about(find_runs([tmp_path / "runs"])) == "Student: s; teacher: t."
    one = "Student: s; teacher: t; token weights: {}."
    assert about(find_runs([tmp_path / "runs" / "mine" / "seed_1"])) == one.format("IW-OPD")
    assert about(find_runs([tmp_path / "runs" / "opd" / "seed_1"])) == one.format("OPD")


def test_events_are_listed(tmp_path):
    run = write_run(tmp_path / "run", [training(1)])
    append_event(run, 3, "gate", "engine & trainer differ")
    append_event(run, 4, "resumed", "from round 3")
    page = write_report(run).read_text()
    cells = [f"<span>{text}</span>" for text in ("gate", "engine &amp; trainer differ", "resumed")]
    places = [page.index(cell) for cell in cells]
    assert places == sorted(places)


def test_prefix_continuations_and_trajectories_are_drawn(tmp_path):
    run = write_run(tmp_path / "run", [training(1)])
    point = {"mean": 0.5, "mean_interval": [0.4, 0.6], "samples": 4}
    points = [{"fraction": f, "student": point, "teacher": point} for f in (0, 0.5)]
    (run / "prefixes.json").write_text(json.dumps({"points": points}))
    sample = {"prompt": "p", "response": "ab", "answer": "x", "correct": True}
    sample |= {"tokens": ["a", "b"], "gap": [0, 1], "weight": [1, 1]}
    sample |= {"weight_iw": [1.5, 1.0], "weight_iw_signed": [1.0, 1.5]}
    (run / "samples").mkdir()
    (run / "samples" / "round_000005.jsonl").write_text(json.dumps(sample) + "\n")
    write_report(run)
    drawn = {p.stem for p in (run / "figures").iterdir()}
    assert {"prefix_continuation", "weight_unsigned", "weight_signed"} <= drawn
