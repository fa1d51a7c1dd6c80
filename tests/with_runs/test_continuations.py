"""Continuing from student prefixes: the cut, and the demo's student and teacher."""

import json
import shutil

import pytest
from forked import ROOT, iwopd

from iwopd_megatron.batch.trajectory import Trajectory
from iwopd_megatron.config.load import load_recipe
from iwopd_megatron.evaluation.continuations import cut, joined
from iwopd_megatron.report.page import write_report


def answer(*ids, **changes):
    return Trajectory(3, [7], list(ids), rollout_logp=[-1.0] * len(ids), **changes)


@pytest.mark.parametrize(("fraction", "kept"), [(0, 0), (0.1, 1), (0.29, 2), (0.3, 3), (0.99, 9)])
def test_a_prefix_is_so_much_of_the_response_and_never_all(fraction, kept):
    assert cut(answer(*range(10)), fraction).response_ids == list(range(kept))
    assert cut(answer(5), 0.99).response_ids == []


def test_a_whole_answer_is_prefix_and_continuation():
    whole = joined(answer(1, 2), answer(3, 4))
    assert (whole.response_ids, whole.truncated) == ([1, 2, 3, 4], False)
    assert (whole.index, whole.prompt_ids) == (3, [7])
    assert joined(answer(1), answer(2, truncated=True)).truncated


@pytest.fixture
def run(tmp_path):
    """A run folder as far as the command reads it."""
    shutil.copy(ROOT / "recipes/demo_tiny_moe.yaml", tmp_path / "recipe.yaml")
    (tmp_path / "metrics.jsonl").write_text("")
    return tmp_path


def test_the_demos_teacher_comes_down_to_the_student(run):
    words = ["--at", "0.9,0,0.5", "--problems", "48", "--samples", "4", "--processes", "2"]
    done = iwopd("prefixes", run, *words)
    assert done.returncode == 0, done.stderr
    found = json.loads((run / "prefixes.json").read_text())
    recipe = load_recipe(ROOT / "recipes/demo_tiny_moe.yaml")
    assert (found["teachers"], found["problems"]) == ({"": str(recipe.teacher.hf)}, 48)
    start, middle, end = found["points"]
    assert [p["fraction"] for p in found["points"]] == [0, 0.5, 0.9]
    assert start["tokens"] == 0 and 14 < middle["tokens"] < 20 < end["tokens"] < 39
    assert start["teacher"]["mean"] > 0.95
    assert start["teacher"]["mean"] > middle["teacher"]["mean"] > end["teacher"]["mean"]
    assert 0.05 < end["student"]["mean"] <= end["teacher"]["mean"] < 0.4
    assert 0.1 < start["student"]["mean"] < 0.3 and start["student"]["samples"] == 4
    assert (write_report(run).parent / "figures" / "prefix_continuation.png").exists()


def test_every_source_has_its_teacher(run):
    """One teacher sorts. The other is the student, and sorts are no answers to its `math`."""
    problems = (ROOT / "recipes/demo/eval.jsonl").read_text().splitlines()[:32]
    rows = [json.loads(problem) for problem in problems]
    for row in rows[::2]:
        row["source"] = "math"
    (run / "eval.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    file, words = run / "recipe.yaml", ["--at", "0", "--problems", "32", "--samples", "4"]
    text = file.read_text().replace("recipes/demo/eval.jsonl", f"{run}/eval.jsonl")
    one, two = "selection_sort: {hf: recipes/demo/teacher}", "math: {hf: recipes/demo/student}"
    teachers = text.replace(
        "teacher:\n  hf: recipes/demo/teacher\n", f"teachers:\n  {one}\n  {two}\n"
    )
    file.write_text(teachers)
    done = iwopd("prefixes", run, *words)
    assert done.returncode == 0, done.stderr
    (point,) = json.loads((run / "prefixes.json").read_text())["points"]
    for name in ("teacher", "student"):
        assert f"{name} from 0% of the student's answers to 16 problems" in done.stdout
    assert 0.47 < point["teacher"]["mean"] <= 0.5
    (run / "prefixes.json").unlink()
    file.write_text(teachers.replace(f"  {two}\n", ""))
    done = iwopd("prefixes", run, *words)
    assert done.returncode == 2 and "no teacher is for source 'math'" in done.stderr
    assert not (run / "prefixes.json").exists()


@pytest.mark.parametrize(
    ("change", "words", "sentence"),
    [
        ("", ["--at", "0,1"], "--at '0,1' is not a list of shares from 0 to below 1"),
        ("", ["--at", "a"], "--at 'a' is not a list"),
        ("", ["--trained"], "has no trained student yet"),
        ("  eval: recipes/demo/eval.jsonl\n", [], "has no data.eval"),
    ],
)
def test_what_cannot_be_asked_is_one_sentence(run, change, words, sentence):
    file = run / "recipe.yaml"
    file.write_text(file.read_text().replace(change, "") if change else file.read_text())
    done = iwopd("prefixes", run, *words)
    assert done.returncode == 2 and sentence in done.stderr and "Traceback" not in done.stderr
    assert not (run / "prefixes.json").exists()
