"""Run `iwopd eval`: a model answers benchmarks, the answers are graded and summed up.

Random numbers are the same for every model. Answers of one batch are always generated together, so
that a run that was killed and started again ends with the very same samples.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
from transformers import AutoTokenizer

from iwopd_megatron.batch.trajectory import Trajectory
from iwopd_megatron.config.recipe import Recipe
from iwopd_megatron.data.benchmarks import Benchmark
from iwopd_megatron.evaluation.answering import answering_engine
from iwopd_megatron.evaluation.answers import Answers, Place
from iwopd_megatron.evaluation.evaluate import STREAM
from iwopd_megatron.evaluation.pass_at_k import summarise
from iwopd_megatron.evaluation.progress import BenchProgress
from iwopd_megatron.files.run_files import write_whole
from iwopd_megatron.grading.graders import grade
from iwopd_megatron.grading.pool import Grade, Submission
from iwopd_megatron.rollout.engine import Prompt, RolloutEngine, Sampling
from iwopd_megatron.runtime.parallel import Parallel

MOST_PROBLEMS = 2**20  # a prompt's index is sample * this + problem
GRADED_AT_ONCE = 256
ANSWER_CHARACTERS = 2000  # of a reference answer in samples.jsonl; a program's tests can be huge


@dataclass(frozen=True)
class BenchRun:
    """The request of one `iwopd eval`; the benchmarks have their prompts.

    recipe: an answering recipe, whose student is the model; model: what identifies it in the files.
    """

    recipe: Recipe
    benchmarks: list[Benchmark]
    model: dict[str, Any]
    out: Path
    samples: int
    max_tokens: int
    temperature: float
    top_p: float
    seed: int


def run_benchmarks(run: BenchRun, parallel: Parallel, progress: BenchProgress) -> dict[str, Any]:
    """Return scores by benchmark, also in out/results.json; in a world of one process."""
    tokenizer = AutoTokenizer.from_pretrained(run.recipe.student.hf)
    with contextlib.ExitStack() as stack:

        @functools.cache
        def engine() -> RolloutEngine:  # nobody waits for one if all answers are there
            return stack.enter_context(answering_engine(run.recipe, parallel, progress.say))

        results = {b.name: _run_one(run, b, tokenizer, engine, progress) for b in run.benchmarks}
    _write(run, results)
    return results


def _run_one(
    run: BenchRun,
    benchmark: Benchmark,
    tokenizer: Any,
    engine: Callable[[], RolloutEngine],
    progress: BenchProgress,
) -> dict[str, Any]:
    """Write and grade the answers to one benchmark that are not there yet; return its scores."""
    places, prompts, sampling = _requests(run, benchmark)
    answers = Answers(run.out / benchmark.name, _settings(run, prompts, sampling))
    done = sum(place in answers.found for place in places)
    start = time.perf_counter()
    if done < len(places):
        writer = engine()
        progress.start(f"{benchmark.name}: answers", len(places), done)
        _generate(run, writer, answers, prompts, places, sampling, tokenizer, progress)
    result = _graded(benchmark, answers, sorted(places), progress)
    progress.finish(benchmark.name, result, time.perf_counter() - start)
    return result


def _requests(
    run: BenchRun, benchmark: Benchmark
) -> tuple[list[Place], dict[int, list[int]], Sampling]:
    """Return all places, the prompts' ids by problem, and how their answers are drawn."""
    prompts = dict(enumerate(benchmark.prompts))
    count = 1 if benchmark.is_greedy else run.samples
    temperature, top_p = (0.0, 1.0) if benchmark.is_greedy else (run.temperature, run.top_p)
    places = [(problem, sample) for sample in range(count) for problem in prompts]
    return places, prompts, Sampling(run.max_tokens, temperature, top_p, run.seed, STREAM)


def _settings(run: BenchRun, prompts: dict[int, list[int]], sampling: Sampling) -> dict[str, Any]:
    """Return what answers depend on; the number of samples is free, more can be added."""
    digest = hashlib.sha256(json.dumps(list(prompts.values())).encode()).hexdigest()
    return run.model | {
        "engine": run.recipe.rollout.engine,
        "prompts": digest,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "max_tokens": sampling.max_tokens,
        "seed": sampling.seed,
    }


def _generate(
    run: BenchRun,
    engine: RolloutEngine,
    answers: Answers,
    prompts: dict[int, list[int]],
    places: list[Place],
    sampling: Sampling,
    tokenizer: Any,
    progress: BenchProgress,
) -> None:
    """Generate every batch that lacks an answer, whole; answers are kept as each ends."""

    def keep(sample: Trajectory) -> None:
        number, problem = divmod(sample.index, MOST_PROBLEMS)
        text = tokenizer.decode(sample.response_ids, skip_special_tokens=True)
        answers.add((problem, number), sample, text)
        progress.advance(len(answers.found))

    is_embedded = run.recipe.rollout.engine == "hf"
    size = run.recipe.rollout.batch_size if is_embedded else len(places)
    for first in range(0, len(places), size):
        batch = places[first : first + size]
        lacking = [place for place in batch if place not in answers.found]
        if not lacking:
            continue
        asked = batch if is_embedded else lacking  # an embedded batch's sums depend on its members
        requests = [
            Prompt(number * MOST_PROBLEMS + problem, prompts[problem]) for problem, number in asked
        ]
        engine.generate(requests, sampling, keep)


def _graded(
    benchmark: Benchmark, answers: Answers, places: list[Place], progress: BenchProgress
) -> dict[str, Any]:
    """Grade what was not graded yet, write samples.jsonl, and return the scores of these places."""
    graded = {(x["problem"], x["sample"]): x for x in answers.finished() or []}
    todo = [place for place in places if place not in graded]
    progress.start(f"{benchmark.name}: grades", len(places), len(places) - len(todo))
    for first in range(0, len(todo), GRADED_AT_ONCE):
        part = todo[first : first + GRADED_AT_ONCE]
        graded |= dict(zip(part, _grade(benchmark, answers, part), strict=True))
        progress.advance(len(graded))
    lines = [graded[place] for place in sorted(graded)]
    answers.finish(lines)
    asked = [graded[place] for place in places]
    grades = numpy.array([line["correct"] for line in asked], dtype=float)
    grades = grades.reshape(len(benchmark.problems), -1)
    result = {"greedy": benchmark.is_greedy} | summarise(grades)
    result["truncated"] = float(numpy.mean([line["truncated"] for line in asked]))
    result["grading_trouble"] = dict(Counter(x["trouble"] for x in asked if x.get("trouble")))
    result["tokens"] = float(numpy.mean([line["tokens"] for line in asked]))
    return result


def _grade(benchmark: Benchmark, answers: Answers, places: list[Place]) -> list[dict[str, Any]]:
    """Return the lines of samples.jsonl at these places; a truncated answer is wrong."""
    found = [(benchmark.problems[place[0]], answers.found[place]) for place in places]
    whole = [i for i, (_, answer) in enumerate(found) if not answer["truncated"]]
    asked = [
        Submission(found[i][0].grader, found[i][1]["response"], found[i][0].answer) for i in whole
    ]
    grades = dict(zip(whole, grade(asked), strict=True))
    return [
        {"prompt": problem.prompt, "answer": problem.answer[:ANSWER_CHARACTERS]}
        | answer
        | _line(grades.get(i, Grade(0.0)))
        for i, (problem, answer) in enumerate(found)
    ]


def _line(grade: Grade) -> dict[str, Any]:
    return {"correct": grade.right} | ({"trouble": grade.trouble} if grade.trouble else {})


def _write(run: BenchRun, results: dict[str, Any]) -> None:
    figures = {
        "model": run.model["model"],
        "engine": run.recipe.rollout.engine,
        "seed": run.seed,
        "temperature": run.temperature,
        "top_p": run.top_p,
        "max_tokens": run.max_tokens,
        "enable_thinking": run.recipe.thinks_in_evaluation,
        "benchmarks": results,
    }
    write_whole(run.out / "results.json", json.dumps(figures, indent=2) + "\n")
