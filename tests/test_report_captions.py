"""Captions of pages of every kind: each is of a chart that is there, and names the paper."""

import json

import pytest
from test_report import Elements, evaluation, training, write_comparison, write_run

from iwopd_megatron.report.data import find_runs, read_runs
from iwopd_megatron.report.figures import sections
from iwopd_megatron.report.figures_by_position import Early
from iwopd_megatron.report.page import write_report
from iwopd_megatron.report.pairs import PairGain

NONE = Early([], "")
FULL = training(
    1,
    entropy_deciles=[1.0] * 10,
    drift_deciles=[0.1] * 10,
    clipped=0.1,
    tis_capped=0.1,
    clipped_deciles=[0.1] * 10,
    tis_capped_deciles=[0.1] * 10,
    scored_early=0.5,
    tokens_per_second=9.0,
    peak_rss_gib=2.5,
    time={"generate": 2.0, "sync": 1.0},
    tokens_deciles=[4] * 10,
)
POINT = {"mean": 0.5, "mean_interval": [0.4, 0.6]}
PREFIXES = {"a": {"points": [{"fraction": 0.5, "student": POINT, "teacher": POINT}]}}
SAMPLES = [{"weight_iw": [1.5, 1.0], "weight_iw_signed": [1.0, 1.5]}] * 2
PAIRS = {"iw": [PairGain(7.6, 2.0, [1.0, 3.0]), PairGain(2.3, 1.0, None)]}


def records(rounds=8, **changes):
    return [evaluation(0, 0.1), *(FULL | changes | {"round": n + 1} for n in range(rounds))]


def kinds():
    """Runs of each kind of page, and what else there is beside them."""
    everything = dict(prefixes=PREFIXES, early=Early(SAMPLES, "IW-OPD, round 1"), pairs=PAIRS)
    arms = {arm: {1: records(), 2: records()} for arm in ("opd", "iw", "prefix")}
    yield "comparison", arms, everything
    yield "single run", {"mine": {1: records()}}, {}
    yield "one round", {"mine": {1: records(1)}}, {}
    yield "no round", {"mine": {1: []}}, {}
    yield "evaluation only", {"mine": {1: [evaluation(0, 0.1), evaluation(5, 0.2)]}}, {}
    yield "unequal runs", {"opd": {1: records(8)}, "iw": {1: records(2), 2: records(8)}}, {}
    for key in sorted(FULL.keys() - {"kind", "round"}):
        without = [{k: v for k, v in line.items() if k != key} for line in records()]
        yield f"without {key}", {"opd": {1: without}, "iw": {1: without}}, {}
        nothing = records(**{key: None})
        yield f"null {key}", {"opd": {1: nothing}, "iw": {1: nothing}}, {}


def charts_of(runs, prefixes=None, early=NONE, pairs=None):
    made = sections(runs, prefixes or {}, early, pairs or {})
    return {name: chart for section in made for name, chart in section.charts.items()}


def texts(axes):
    legend = axes.figure.legends[0].get_texts() if axes.figure.legends else []
    return [text.get_text().replace("\n", " ") for text in legend]


@pytest.mark.parametrize(("kind", "runs", "more"), [pytest.param(*k, id=k[0]) for k in kinds()])
def test_captions_describe_what_is_drawn(kind, runs, more):
    for name, (figure, caption) in charts_of(runs, **more).items():
        (axes,) = figure.axes
        legend = texts(axes)
        assert ("(dotted)" in caption) == any("first 3 rounds" in text for text in legend), name
        assert ("Black:" in caption) == any("mean of" in text for text in legend), name
        assert ("“other”" in caption) == ("other" in legend), name
        assert ("OPD is 1 everywhere" in caption) == (
            name == "weight_by_position" and "opd" in runs
        )
        if "Fig." in caption:
            assert "IW-OPD, arXiv 2606.22600" in caption, name
        by_position = "Position" in axes.get_xlabel() or "prefix (tokens)" in axes.get_xlabel()
        is_cut = "Cut where fewer than 25 %" in caption or "under 25 %" in caption
        assert by_position == (is_cut or "cut where fewer than 25 %" in caption), name
        for word in ("Second chart", "Then the", "the paper."):
            assert word not in caption, name


def test_first_and_last_rounds_are_compared_only_where_they_differ():
    short = charts_of({"mine": {1: records(5)}})["reverse_kl_by_position"]
    assert "mean over all rounds" in short.caption and texts(short.figure.axes[0]) == ["mine"]
    long = charts_of({"mine": {1: records(6)}})["reverse_kl_by_position"]
    assert texts(long.figure.axes[0]) == ["first 3 rounds", "mine"]
    started = {"opd": {1: records(6), 2: records(6)}, "iw": {1: records(6), 2: records(1)}}
    going = charts_of(started)["reverse_kl_by_position"]
    assert texts(going.figure.axes[0]) == ["first 3 rounds", "OPD", "IW-OPD"]
    iw = [line for line in going.figure.axes[0].lines if line.get_color() == "#D55E00"]
    assert len(iw) == 1  # not of the run that has one round


def test_every_picture_on_a_page_has_its_own_caption(tmp_path):
    for folder in (
        write_comparison(tmp_path / "both"),
        write_run(tmp_path / "one", [evaluation(0, 0.5), training(1)]),
        write_run(tmp_path / "sft", [{"kind": "round", "round": 1, "grad_norm": 1.0}]),
    ):
        tags = [tag for tag, _ in Elements(write_report(folder).read_text()).tags]
        tags = [tag for tag in tags if tag in ("img", "figcaption")]
        assert tags and tags == ["img", "figcaption"] * (len(tags) // 2)


def test_bands_are_explained_only_where_there_are_seeds(tmp_path):
    one = write_run(tmp_path / "one", [evaluation(0, 0.5), training(1)])
    assert "In the charts" not in write_report(one).read_text()
    page = write_report(write_comparison(tmp_path / "both")).read_text()
    assert "of two seeds: from one to the other" in page


def test_a_run_that_has_just_begun_does_not_shorten_the_mean():
    runs = {"opd": {seed: records(8) for seed in (1, 2, 3)} | {4: records(1)}}
    (axes,) = charts_of(runs)["reverse_kl"].figure.axes
    lines = {line.get_label(): list(line.get_xdata()) for line in axes.lines}
    assert lines["OPD"] == list(range(1, 9))
    assert [1] in lines.values()  # and is there


def test_no_scale_reaches_below_what_can_be():
    charts = charts_of({"opd": {1: records(truncated=0.0, drift=0.0)}})
    assert charts["truncated"].figure.axes[0].get_ylim()[0] == 0
    steep = [training(n, grad_norm=10.0 ** (3 - n)) for n in range(1, 6)]
    norm = charts_of({"opd": {1: steep}})["grad_norm"].figure.axes[0]
    assert norm.get_yscale() == "log" and 0.001 < norm.get_ylim()[0] < 0.01
    still = charts_of({"opd": {1: [training(1, grad_norm=0.0)]}})["grad_norm"].figure.axes[0]
    assert still.get_yscale() == "linear"


def test_long_names_are_wrapped_in_legends_and_shown_in_full():
    name = "a-very-long-name-of-an-arm-that-somebody-chose-for-a-reason lr 0.0003"
    charts = charts_of({name: {1: records()}, name + " b": {1: records()}})
    for chart in charts.values():
        figure = chart.figure
        figure.canvas.draw()
        edge = figure.bbox.x1
        for legend in figure.legends:
            assert legend.get_window_extent().x1 <= edge + 1
    shown = texts(charts["accuracy"].figure.axes[0])
    assert shown == [name, name + " b"] or [s.replace(" ", "") for s in shown] == [
        name.replace(" ", ""),
        (name + " b").replace(" ", ""),
    ]


def test_values_of_null_leave_a_gap_and_no_error(tmp_path):
    run = write_run(
        tmp_path / "run", [training(1, loss=None, reverse_kl=None), evaluation(1, None)]
    )
    sample = {"prompt": "p", "response": "ab", "answer": "x", "correct": True, "tokens": ["a", "b"]}
    sample |= {"gap": [None, 1], "weight": [1, None], "weight_iw": [None, 1.0]}
    (run / "samples").mkdir()
    (run / "samples" / "round_000001.jsonl").write_text(json.dumps(sample) + "\n")
    assert write_report(run).exists()
    assert list(read_runs(find_runs([run])))
