"""What is in the way of grading is shown: in a run's events, in its metrics, by `iwopd eval`."""

import json
from collections import Counter
from types import SimpleNamespace

from iwopd_megatron.batch.trajectory import Trajectory
from iwopd_megatron.data.benchmarks import Benchmark
from iwopd_megatron.data.problems import Problem
from iwopd_megatron.evaluation import evaluate, run_benchmarks
from iwopd_megatron.evaluation.answers import Answers
from iwopd_megatron.evaluation.progress import BenchProgress
from iwopd_megatron.grading.pool import Grade
from iwopd_megatron.records.recorder import Recorder
from iwopd_megatron.train.progress import Progress
from iwopd_megatron.train.round_log import RoundLog

FOUND = [Grade(1.0), Grade(0.0, "cut at 2 s"), Grade(0.0, "crashed"), Grade(0.0, "cut at 2 s")]
PROBLEMS = [Problem(f"{i}?", str(i), 0.0, "math") for i in range(4)]


class Tokenizer:
    def batch_decode(self, ids, skip_special_tokens):
        return [str(x) for x in ids]


def test_an_evaluation_counts_it(monkeypatch):
    monkeypatch.setattr(evaluate, "grade", lambda answers: FOUND[: len(answers)])
    monkeypatch.setattr(evaluate, "gather", lambda own: [own])
    monkeypatch.setattr(evaluate.dist, "get_rank", lambda: 0)
    monkeypatch.setattr(evaluate.dist, "get_world_size", lambda: 1)
    samples = [Trajectory(i, [1], [2]) for i in range(4)]
    assert evaluate.grade_samples(samples, PROBLEMS, Tokenizer()) == FOUND

    found = evaluate.Evaluation.__new__(evaluate.Evaluation)
    found.main = SimpleNamespace(grades=lambda engine: FOUND, problems=PROBLEMS)
    found.named = {"aime24": SimpleNamespace(grades=lambda engine: FOUND[:2], problems=PROBLEMS)}
    assert found.scores(None) == {"accuracy": 0.25, "problems": 4, "accuracy_aime24": 0.5}
    assert found.trouble == {"cut at 2 s": 3, "crashed": 1}


def test_a_run_says_it_and_keeps_it(tmp_path):
    said = []
    parallel, recipe = SimpleNamespace(is_main=True), SimpleNamespace(out=tmp_path)
    log = RoundLog(Recorder(recipe, parallel, said.append), Progress(0, visible=False))
    log.grading_trouble(7, Counter())
    log.grading_trouble(7, Counter({"crashed": 1, "cut at 2 s": 3}))
    assert said == ["round 7: grading trouble: 3 cut at 2 s, 1 crashed."]
    (event,) = map(json.loads, (tmp_path / "events.jsonl").read_text().splitlines())
    assert event["event"] == "grading" and event["text"] == said[0]


def test_a_benchmark_says_it_and_keeps_it(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(run_benchmarks, "grade", lambda answers: FOUND)
    answers = Answers(tmp_path, {})
    places = [(i, 0) for i in range(4)]
    for place in places:
        answers.add(place, Trajectory(place[0], [1], [2]), "\\boxed{1}")
    progress = BenchProgress()
    result = run_benchmarks._graded(Benchmark("aime24", PROBLEMS), answers, places, progress)
    assert result["grading_trouble"] == {"cut at 2 s": 2, "crashed": 1} and result["mean"] == 0.25
    progress.finish("aime24", result, 1.0)
    assert "4 answers, 1.0 s; grading trouble: 2 cut at 2 s, 1 crashed" in capsys.readouterr().out
    lines = [json.loads(line) for line in answers.final.read_text().splitlines()]
    assert [line.get("trouble") for line in lines] == [None, "cut at 2 s", "crashed", "cut at 2 s"]
