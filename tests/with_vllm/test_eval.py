"""Evaluation and diagnostics of the demo's models, answered by a real vLLM server."""

import json
import shutil
from subprocess import CompletedProcess

import forked
from rig import RECIPE

from iwopd_megatron.runtime.services import outer_environment


def iwopd(*words) -> CompletedProcess:
    return forked.iwopd(*words, env=outer_environment(), timeout=600)


def evaluate(out, *words) -> CompletedProcess:
    return iwopd("eval", RECIPE, "--bench", "toy", "--max-tokens", "43", "--out", out, *words)


def test_the_students_accuracy_and_every_sample(tmp_path):
    """The embedded engine measured 0.191 to 0.195 on these problems before training."""
    done = evaluate(tmp_path / "eval", "--samples", "1")
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((tmp_path / "eval/results.json").read_text())
    figures = found["benchmarks"]["toy"]
    low, high = figures["mean_interval"]
    assert low < 0.195 < high and high - low < 0.1 and figures["samples"] == 1
    samples = (tmp_path / "eval/toy/samples.jsonl").read_text().splitlines()
    grades = [json.loads(line)["correct"] for line in samples]
    assert len(grades) == 512 and figures["mean"] == sum(grades) / 512
    log = next((tmp_path / "eval").glob("**/rollout-0.log"))
    written = log.stat().st_mtime_ns
    again = evaluate(tmp_path / "eval", "--samples", "1")  # all answers are there: no server
    assert again.returncode == 0 and log.stat().st_mtime_ns == written
    assert not list((tmp_path / "eval").glob("**/*.safetensors"))  # a copy of the weights


def test_teacher_and_student_continue_prefixes(tmp_path):
    """A server of the student, then one of the teacher; answers end at the recipe's limit."""
    shutil.copy(RECIPE, tmp_path / "recipe.yaml")
    words = ["--at", "0,0.9", "--problems", 64, "--samples", 2]
    done = iwopd("prefixes", tmp_path, *words)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((tmp_path / "prefixes.json").read_text())
    start, end = found["points"]
    assert found["engine"] == "vllm" and start["tokens"] == 0 and end["tokens"] > 15
    assert start["teacher"]["mean"] > 0.95 > 0.5 > end["teacher"]["mean"]
    assert max(start["student"]["mean"], end["student"]["mean"]) < 0.4
    refused = iwopd("prefixes", tmp_path, *words, "--processes", 2)
    assert refused.returncode == 2 and "--processes 2 is for the embedded engine" in refused.stderr
