"""What a report says was found, for constructed runs whose answer is known."""

import io
import json
import re
from html import unescape
from pathlib import Path

import pytest

from iwopd_megatron.cli.report import report
from iwopd_megatron.errors import RecipeError
from iwopd_megatron.launch.status import print_status
from iwopd_megatron.records.words import arm_name, percent, points
from iwopd_megatron.report.data import find_runs
from iwopd_megatron.report.finding import findings
from iwopd_megatron.report.page import write_report
from iwopd_megatron.report.summary import summarise
from iwopd_megatron.report.terminal import print_table
from iwopd_megatron.train.compare import plan_arms
from iwopd_megatron.train.progress import Progress


def write_curves(folder, curves, planned=None, done=None):
    """curves: arm -> seed -> {round: accuracy in %}; done: the last round of every run."""
    for arm, seeds in curves.items():
        for seed, curve in seeds.items():
            run = folder / arm / f"seed_{seed}"
            run.mkdir(parents=True)
            last = max(curve, default=0) if done is None else done
            records = [{"kind": "round", "round": n, "loss": 1.0} for n in range(1, last + 1)]
            records += [
                {"kind": "eval", "round": n, "accuracy": None if a is None else a / 100}
                for n, a in curve.items()
            ]
            text = "".join(json.dumps(record) + "\n" for record in records)
            (run / "metrics.jsonl").write_text(text)
            if planned is not None:
                (run / "recipe.yaml").write_text(f"train:\n  rounds: {planned}\n")
    return folder


def said(folder):
    return findings(summarise(find_runs([folder])))


def finals(values, start=20.0, end=20):
    return {seed: {0: start, end: value} for seed, value in enumerate(values, start=1)}


def test_a_difference_that_the_seeds_agree_on_is_told(tmp_path):
    """Gains 1, 2, 3: mean 2, half-width 4.303 / sqrt(3) = 2.484 is too wide; 2, 2.2, 2.4 is not."""
    wide = {"opd": finals([50, 51, 52]), "iw": finals([51, 53, 55])}
    assert said(write_curves(tmp_path / "wide", wide)) == [
        "No difference can be told with 3 seeds: IW-OPD ended 2.0 points above OPD "
        "(95 % interval -0.5 to 4.5)."
    ]
    above = {"opd": finals([50, 51, 52]), "iw": finals([52, 53.2, 54.4])}
    assert said(write_curves(tmp_path / "above", above)) == [
        "IW-OPD ended 2.2 points above OPD (95 % interval 1.7 to 2.7, 3 seeds)."
    ]
    below = {"opd": finals([52, 53.2, 54.4]), "iw": finals([50, 51, 52])}
    assert said(write_curves(tmp_path / "below", below)) == [
        "IW-OPD ended 2.2 points below OPD (95 % interval -2.7 to -1.7, 3 seeds)."
    ]


def test_the_test_is_paired(tmp_path):
    """Seeds that differ by 20 points between them, and by 2 to 2.2 within every pair."""
    curves = {"opd": finals([30, 50, 70]), "iw": finals([32, 52.1, 72.2])}
    (sentence,) = said(write_curves(tmp_path, curves))
    assert sentence == "IW-OPD ended 2.1 points above OPD (95 % interval 1.9 to 2.3, 3 seeds)."


def test_with_one_or_two_seeds_nothing_is_told(tmp_path):
    one = {"opd": finals([50]), "iw": finals([60])}
    assert said(write_curves(tmp_path / "one", one)) == [
        "No difference can be told with 1 seed: IW-OPD ended 10.0 points above OPD."
    ]
    two = {"opd": finals([50, 60]), "iw": finals([58.6, 55.1])}
    assert said(write_curves(tmp_path / "two", two)) == [
        "No difference can be told with 2 seeds: IW-OPD ended 1.9 points above OPD "
        "(seed 1: +8.6, seed 2: -4.9)."
    ]
    alike = {"opd": finals([50, 60]), "iw": finals([60, 70])}  # however well they agree
    assert said(write_curves(tmp_path / "alike", alike))[0].startswith("No difference can be told")


def test_ties(tmp_path):
    same = {"opd": finals([50, 60, 70]), "iw": finals([50, 60, 70])}
    (sentence,) = said(write_curves(tmp_path / "same", same))
    assert "No difference can be told with 3 seeds: IW-OPD ended exactly level" in sentence
    level = {"opd": finals([50, 60, 70]), "iw": finals([51, 59, 70])}
    (sentence,) = said(write_curves(tmp_path / "level", level))
    assert "ended within 0.05 points of OPD" in sentence and "-0.0" not in sentence


def test_seeds_that_only_one_arm_has_do_not_count(tmp_path):
    curves = {"opd": finals([50, 51, 52]), "iw": finals([52, 53.2, 54.4, 99, 99])}
    (sentence,) = said(write_curves(tmp_path, curves))
    assert sentence.startswith("IW-OPD ended 2.2 points above OPD (95 % interval 1.7 to 2.7, 3 ")


def test_arms_without_a_common_seed(tmp_path):
    own = {seed + 10: curve for seed, curve in finals([60, 61, 62]).items()}
    (sentence,) = said(write_curves(tmp_path, {"opd": finals([50, 51, 52]), "iw": own}))
    # Welch: 1 and 1 over 3, 4 degrees of freedom: 2.776 * sqrt(2 / 3) = 2.27
    assert sentence == (
        "IW-OPD ended 10.0 points above OPD (95 % interval 7.7 to 12.3, "
        "3 against 3 seeds, none of them shared)."
    )


def test_every_arm_is_compared_with_opd(tmp_path):
    curves = {
        "opd": finals([50, 51, 52]),
        "iw": finals([52, 53.2, 54.4]),
        "suffix": finals([10, 11.5, 12]),
        "prefix": finals([50, 52, 51]),
    }
    found = said(write_curves(tmp_path, curves))
    assert found[0].startswith("IW-OPD ended 2.2 points above OPD")
    assert found[1].startswith("No difference can be told with 3 seeds: prefix only ended within")
    assert found[2].startswith("suffix only ended 39.8 points below OPD")
    assert found[3].startswith("Each of these 3 intervals stands for itself") and len(found) == 4


def test_without_opd_the_first_arm_is_the_reference(tmp_path):
    curves = {"1e-4": finals([50, 51, 52]), "3e-4": finals([52, 53.2, 54.4])}
    folder = write_curves(tmp_path, curves)
    assert said(folder) == ["3e-4 ended 2.2 points above 1e-4 (95 % interval 1.7 to 2.7, 3 seeds)."]
    assert "Gain over 1e-4, final (points)" in write_report(folder).read_text()


def test_one_arm_says_where_it_ended(tmp_path):
    for count, end in {
        1: "(1 seed, so its spread is unknown).",
        2: "(mean of 2 seeds: 50.0 and 52.0).",
        3: "(95 % interval 47.0 to 57.0, 3 seeds).",
    }.items():
        curves = {"mine": finals([50, 52, 54][:count])}
        (sentence,) = said(write_curves(tmp_path / str(count), curves))
        mean = {1: "50.0", 2: "51.0", 3: "52.0"}[count]
        assert sentence == f"mine ended at {mean} % right answers, from 20.0 % at its start {end}"


def test_what_is_not_evaluated_is_not_judged(tmp_path):
    nothing = write_curves(tmp_path / "nothing", {"mine": {1: {}}})
    assert said(nothing) == ["mine: mine has no finished round."]
    started = write_curves(tmp_path / "started", {"mine": {1: {}}}, done=2)
    assert said(started) == ["mine: mine has no evaluation after 2 rounds."]
    nan = write_curves(tmp_path / "nan", {"opd": {1: {0: 20, 5: None}}, "iw": {1: {0: 20, 5: 30}}})
    assert said(nan)[0].endswith(
        "cannot be compared with OPD yet: only their starts are evaluated."
    )
    half = write_curves(tmp_path / "half", {"opd": finals([50]), "iw": {1: {}}}, done=3)
    assert said(half)[0].startswith("IW-OPD cannot be compared with OPD yet: IW-OPD has no eval")


def test_runs_that_are_still_going_are_compared_where_both_have_been(tmp_path):
    late = {seed: {0: 20.0, 10: 41.0 + seed} for seed in (1, 2, 3)}
    done = {seed: {0: 20.0, 10: 40.0 + seed, 20: 90.0} for seed in (1, 2, 3)}
    folder = write_curves(tmp_path, {"opd": done, "iw": late}, planned=20)
    found = said(folder)
    assert found[0] == (
        "IW-OPD was, at round 10 of 20, 1.0 point above OPD (95 % interval 1.0 to 1.0, 3 seeds)."
    )
    assert found[1] == (
        "Not finished: IW-OPD seed 1 (round 10 of 20), IW-OPD seed 2 (round 10 of 20) and "
        "IW-OPD seed 3 (round 10 of 20)."
    )
    page = write_report(folder).read_text()
    assert "43.0 ± 0.6 <small>at round 10</small>" in page
    assert "+1.0 <small>[+1.0, +1.0], at round 10</small>" in page


def test_a_seed_that_has_just_begun_does_not_hold_back_the_others(tmp_path):
    """Three pairs are at the end, the fourth is at round 5 of 20."""
    curves = {"opd": finals([50, 51, 52, 53]), "iw": finals([52, 53.2, 54.4])}
    curves["iw"][4] = {0: 20.0, 5: 25.0}
    found = said(write_curves(tmp_path, curves, planned=20))
    assert found == [
        "IW-OPD ended 2.2 points above OPD (95 % interval 1.7 to 2.7, 3 seeds; "
        "1 seed left out, not as far).",
        "Not finished: IW-OPD seed 4 (round 5 of 20).",
    ]
    page = write_report(tmp_path).read_text()
    assert "53.2 ± 0.7 <small>3 of 4 seeds</small>" in page and "<span>5 to 20 of 20</span>" in page


def test_one_seed_that_is_ahead_does_not_speak_for_all(tmp_path):
    """One of three pairs is at round 30, all at round 20."""
    curves = {"opd": finals([50, 51, 52]), "iw": finals([52, 53.2, 54.4])}
    for arm in curves:
        curves[arm][1] |= {30: 90.0}
    found = said(write_curves(tmp_path, curves, planned=30))
    assert found[0].startswith("IW-OPD was, at round 20 of 30, 2.2 points above OPD (95 %")


def test_numbers_have_one_form():
    shares = (0.7666, 1.0, -0.0003, None)
    assert [percent(share) for share in shares] == ["76.7", "100.0", "0.0", "–"]
    assert [points(share) for share in shares] == ["+76.7", "+100.0", "+0.0", "–"]
    names = [arm_name(arm) for arm in ("opd", "iw", "a/b/iw_signed", "lr_3")]
    assert names == ["OPD", "IW-OPD", "IW-OPD (signed) (a/b)", "lr_3"]


def terminal(folder):
    stream = io.StringIO()
    print_table(summarise(find_runs([folder])), stream)
    return re.sub(r"\s+", " ", stream.getvalue())


def test_terminal_and_page_say_the_same_in_one_unit(tmp_path):
    curves = {"opd": finals([77.9, 70, 71]), "iw": finals([78.9, 72, 74]), "[bold]x": finals([1])}
    folder = write_curves(tmp_path, curves)
    page, text = unescape(write_report(folder).read_text()), terminal(folder)
    assert text.startswith(said(folder)[0])
    assert re.search(r'<p class="finding">(.*?)</p>', page)[1] == said(folder)[0]
    rows = re.findall(r"<tr>(<td.*?)</tr>", page, re.S)[:3]
    cells = [re.findall(r"<span>(.*?)</span></td>", row) for row in rows]
    assert [row[0] for row in cells] == ["OPD", "IW-OPD", "[bold]x"]
    for row in cells:
        for cell in row:
            for part in re.split(r" <small>|</small>", cell):
                assert part in text, part
    assert "73.0 ± 2.5" in text and "0.7" not in text.replace("20.7", "")
    assert not re.search(r"\bopd\b|\biw\b", text)


def test_the_command_says_it_too_and_its_output_is_the_path(tmp_path, capsys):
    folder = write_curves(tmp_path, {"opd": finals([50, 60]), "iw": finals([58.6, 55.1])})
    report([folder], None)
    out, err = capsys.readouterr()
    assert out == f"{folder / 'report.html'}\n"
    assert re.sub(r"\s+", " ", err).startswith(said(folder)[0])


def test_two_seeds_are_shown_and_no_interval_stands_alone(tmp_path):
    folder = write_curves(tmp_path, {"opd": finals([50, 60]), "iw": finals([58.6, 55.1])})
    for shown in (terminal(folder), unescape(write_report(folder).read_text())):
        assert "seeds +8.6, -4.9" in shown
        assert "Two seeds give no useful interval" in shown and "[-" not in shown
    single = write_curves(tmp_path / "one", {"opd": finals([50]), "iw": finals([58.6])})
    assert "One seed has no interval." in terminal(single) and "[" not in terminal(single)


def test_while_it_trains_accuracy_has_the_unit_of_the_table(capsys):
    progress = Progress(3, visible=True)
    progress.start("opd seed 1")
    progress.evaluation({"accuracy": 0.7666, "round": 2}, {"loss": 0.5})
    print_status({"accuracy": 0.7666})
    assert capsys.readouterr().out.count("accuracy 76.7 %") == 2


def test_every_arm_has_one_folder_of_its_own_below_out(tmp_path, in_the_repository):
    def arms(vary):
        return plan_arms(Path("recipes/demo_tiny_moe.yaml"), [], vary, 1, tmp_path)

    here = Path.cwd() / "recipes/demo/teacher"
    found = arms(f"teacher.hf={here},recipes/demo/teacher")
    folders = [arm.recipe.out.relative_to(tmp_path).parts for arm in found]
    assert [len(parts) for parts in folders] == [2, 2]
    assert folders[1] == ("recipes_demo_teacher", "seed_1")
    with pytest.raises(RecipeError, match="has '1e-4' twice"):
        arms("train.lr=1e-4,1e-4")
    with pytest.raises(RecipeError, match="beside 'recipes/demo/teacher'"):
        arms("teacher.hf=recipes/demo/teacher,recipes/demo//teacher")
