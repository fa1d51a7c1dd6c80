"""`iwopd eval` end to end on the demo's student, killed and resumed, and what it refuses."""

import json
import os
import shutil
import signal
import time
from pathlib import Path

import pytest
from forked import iwopd, started
from typer.testing import CliRunner

from iwopd_megatron.batch.trajectory import Trajectory
from iwopd_megatron.cli.main import app
from iwopd_megatron.data.benchmarks import load_benchmark, with_path
from iwopd_megatron.errors import RecipeError
from iwopd_megatron.evaluation.answers import Answers

RECIPE = "recipes/demo_tiny_moe.yaml"
STUDENT = "recipes/demo/student"
SMALL = ["--engine", "hf", "--max-tokens", "43", "rollout.batch_size=16"]


@pytest.fixture(scope="module")
def few(tmp_path_factory) -> Path:
    """The first 24 held-out problems of the demo."""
    path = tmp_path_factory.mktemp("bench") / "few.jsonl"
    path.write_text("".join(Path("recipes/demo/eval.jsonl").read_text().splitlines(True)[:24]))
    return path


def on_few(few, out) -> list:
    """What `iwopd eval` is told beside the model: four samples of each of these problems."""
    bench = ["--bench", "few", "--bench-file", f"few={few}"]
    return [*bench, "--samples", 4, "--out", out, *SMALL]


@pytest.fixture(scope="module")
def whole(few, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "eval"
    result = iwopd(
        "eval",
        RECIPE,
        *on_few(few, out),
    )
    assert result.returncode == 0, result.stderr
    assert "few" in result.stdout and "mean@n" in result.stdout and result.stderr == ""
    return out


def lines(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_results(whole):
    samples = lines(whole / "few" / "samples.jsonl")
    places = [(x["problem"], x["sample"]) for x in samples]
    assert places == [(p, s) for p in range(24) for s in range(4)]
    assert len({x["response"] for x in samples[:4]}) > 1
    found = json.loads((whole / "results.json").read_text())
    figures = found["benchmarks"]["few"]
    assert figures["mean"] == sum(x["correct"] for x in samples) / 96
    assert figures["truncated"] == sum(x["truncated"] for x in samples) / 96
    assert all(x["correct"] == 0 for x in samples if x["truncated"])
    assert found["model"] == STUDENT and figures["samples"] == 4


def test_more_samples_are_added(whole, few, tmp_path):
    """The first samples are kept: random numbers depend on problem and sample alone."""
    out = shutil.copytree(whole, tmp_path / "eval")
    words = [STUDENT, "--bench", "few", "--bench-file", f"few={few}", "--out", out, *SMALL]
    result = iwopd("eval", *words, "--samples", 5)
    assert result.returncode == 0, result.stderr
    before, after = (lines(x / "few" / "samples.jsonl") for x in (whole, out))
    assert [x for x in after if x["sample"] < 4] == before and len(after) == 120
    stamp = (out / "few" / "answers.jsonl").stat().st_mtime_ns
    assert iwopd("eval", *words, "--samples", 2).returncode == 0
    assert (out / "few" / "answers.jsonl").stat().st_mtime_ns == stamp
    found = json.loads((out / "results.json").read_text())["benchmarks"]["few"]
    assert found["mean"] == sum(x["correct"] for x in before if x["sample"] < 2) / 48


def test_killed_and_resumed(whole, few, tmp_path):
    """SIGKILL with some answers written: the same files in the end, no sample twice."""
    out = tmp_path / "eval"
    words = [
        RECIPE,
        *on_few(few, out),
    ]
    answers = out / "few" / "answers.jsonl"
    process = started("eval", *words)
    while not (answers.exists() and answers.read_bytes().count(b"\n") > 1):
        assert process.poll() is None
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    with answers.open("r+b") as file:  # wherever the kill came, the last line is now torn
        file.truncate(answers.stat().st_size - 7)
    assert 0 < answers.read_bytes().count(b"\n") < 96 and not (out / "results.json").exists()
    result = iwopd("eval", *words)
    assert result.returncode == 0, result.stderr
    for name in ("results.json", "few/samples.jsonl"):
        assert (out / name).read_text() == (whole / name).read_text()
    places = [(x["problem"], x["sample"]) for x in lines(answers)]
    assert len(places) == len(set(places)) == 96


def test_other_settings_are_refused(whole):
    settings = json.loads((whole / "few" / "settings.json").read_text())
    assert settings["model"] == STUDENT and len(Answers(whole / "few", settings).found) == 96
    with pytest.raises(RecipeError, match="holds answers with temperature=1.0, now it is 0.7"):
        Answers(whole / "few", settings | {"temperature": 0.7})


def test_programs_are_greedy(tmp_path):
    """A benchmark of programs: one answer each, whatever --samples says."""
    row = {
        "task_id": "HumanEval/900",
        "prompt": "abc=",
        "entry_point": "f",
        "atol": 0,
        "canonical_solution": "1\ndef f(x): return x",
        "base_input": [[1]],
        "plus_input": [[2]],
    }
    file = tmp_path / "plus.jsonl"
    file.write_text(json.dumps(row) + "\n")
    benchmark = load_benchmark("humaneval+", {"humaneval+": with_path("humaneval+", file, {})})
    (problem,) = benchmark.problems
    assert benchmark.is_greedy and problem.prompt.endswith("```\nabc=\n```")
    assert json.loads(problem.answer) == row


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere"], "nowhere is neither a recipe nor a run"),
        ([RECIPE, "--bench", "gpqa"], "no benchmark 'gpqa'; known ones: aime24"),
        ([RECIPE, "--bench", "mbpp+"], "--bench-file mbpp+=FILE.jsonl or set MBPP_OVERRIDE_PATH"),
        ([RECIPE, "--bench", "toy", "--bench-file", "toy"], "'toy' is not NAME=FILE"),
        ([STUDENT, "--bench", "toy", "--engine", "turbo"], "'rollout.engine' is 'turbo'"),
    ],
)
def test_refusals(words, message, tmp_path):
    result = CliRunner().invoke(app, ["eval", *words, "--out", str(tmp_path)])
    assert isinstance(result.exception, RecipeError)
    assert message in str(result.exception) and "\n" not in str(result.exception)


def test_answers_that_cannot_fit(tmp_path):
    result = iwopd("eval", STUDENT, "--bench", "toy", "--out", tmp_path)
    assert result.returncode == 2 and result.stderr.count("\n") == 1
    assert "write --max-tokens 119" in result.stderr


def test_evalplus_variable(monkeypatch, tmp_path):
    monkeypatch.setenv("MBPP_OVERRIDE_PATH", str(tmp_path / "none.jsonl"))
    with pytest.raises(RecipeError, match="none.jsonl does not exist"):
        load_benchmark("mbpp+", {})


def test_toy_is_the_demos_held_out_file():
    rows = [json.loads(line) for line in Path("recipes/demo/eval.jsonl").read_text().splitlines()]
    problems = load_benchmark("toy", {}).problems
    assert [p.question for p in problems] == [row["question"] for row in rows]


def test_any_text_survives_a_line(tmp_path):
    answers = Answers(tmp_path, {})
    text = 'a\u2028b\nc\u0085 "d" \ud83d\ude00'.encode("utf-16", "surrogatepass").decode("utf-16")
    answers.add((0, 0), Trajectory(0, [1], [2, 3]), text)
    answers.add((0, 0), Trajectory(0, [1], [9]), "again")
    assert Answers(tmp_path, {}).found[0, 0]["response"] == text
    line = {"problem": 0, "sample": 0, "correct": 1.0, "x": text}
    answers.finish([line])
    assert answers.finished() == [line]


def test_megatron_checkpoint(whole, few, tmp_path):
    """A checkpoint is evaluated through an export: the same samples as of the folder it is of."""
    from iwopd_megatron.weights.convert import hf_to_megatron

    hf_to_megatron(Path(STUDENT), tmp_path / "checkpoint", "native")
    result = iwopd(
        "eval",
        tmp_path / "checkpoint",
        "--hf",
        STUDENT,
        *on_few(few, tmp_path / "eval"),
    )
    assert result.returncode == 0, result.stderr
    same = [(x / "few" / "samples.jsonl").read_text() for x in (whole, tmp_path / "eval")]
    assert same[0] == same[1]
