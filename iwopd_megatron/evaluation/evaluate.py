"""Accuracy while training: an engine's answers to held-out problems, graded.

Random numbers are the same in every run and every round, and in no training round.
"""

from __future__ import annotations

from itertools import chain
from typing import Any

import torch.distributed as dist

from iwopd_megatron.batch.trajectory import Trajectory
from iwopd_megatron.config.recipe import Recipe
from iwopd_megatron.data.benchmarks import Benchmark
from iwopd_megatron.data.problems import Problem
from iwopd_megatron.data.run_data import RunData
from iwopd_megatron.grading.graders import grade
from iwopd_megatron.grading.pool import Grade, Submission, count_trouble
from iwopd_megatron.rollout.engine import Prompt, RolloutEngine, Sampling
from iwopd_megatron.runtime.parallel import gather

STREAM = 2**32 - 1  # random numbers no training round uses


class Evaluator:
    """One benchmark, `samples` answers to each problem, the same random numbers each time."""

    def __init__(self, benchmark: Benchmark, tokenizer: Any, sampling: Sampling, samples: int):
        self.problems, self.tokenizer = benchmark.problems * samples, tokenizer
        self.sampling = sampling
        self.prompts = [Prompt(i, ids) for i, ids in enumerate(benchmark.prompts * samples)]

        self.answers: list[Trajectory] = []  # the last ones

    def grades(self, engine: RolloutEngine) -> list[Grade]:
        """Return grades of all answers, whose mean is mean@samples. Collective."""
        self.answers = engine.generate(self.prompts, self.sampling)
        return grade_samples(self.answers, self.problems, self.tokenizer)


class Evaluation:
    """All that a recipe evaluates while it trains: data.eval, and benchmarks by name.

    False where there is nothing. trouble: what was in the way of grading last, by kind.
    """

    def __init__(self, recipe: Recipe, data: RunData, tokenizer: Any):
        self.recipe, self.tokenizer = recipe, tokenizer
        self.trouble = count_trouble([])
        self.main = self._evaluator(data.main, False) if data.main else None
        self.named = {
            name: self._evaluator(benchmark, benchmark.is_greedy)
            for name, benchmark in data.named.items()
        }

    def _evaluator(self, benchmark: Benchmark, greedy: bool) -> Evaluator:
        settings = self.recipe.evaluate
        temperature = 0.0 if greedy else settings.temperature
        limit = self.recipe.rollout.max_response_tokens
        sampling = Sampling(limit, temperature, seed=0, stream=STREAM)
        return Evaluator(benchmark, self.tokenizer, sampling, 1 if greedy else settings.samples)

    def __bool__(self) -> bool:
        return self.main is not None or bool(self.named)

    def scores(self, engine: RolloutEngine) -> dict[str, float]:
        """Return `accuracy` on data.eval, or else the benchmarks' mean, and each `accuracy_NAME`.

        Also `problems`, the answers that the accuracy is of. Sets `trouble`. Collective.
        """
        grades = {name: evaluator.grades(engine) for name, evaluator in self.named.items()}
        named = {name: accuracy(found) for name, found in grades.items()}
        main = [] if self.main is None else self.main.grades(engine)
        self.trouble = count_trouble(chain(main, *grades.values()))
        if self.main is not None:
            mean, problems = accuracy(main), len(self.main.problems)
        else:
            mean = sum(named.values()) / len(named)
            problems = sum(len(evaluator.problems) for evaluator in self.named.values())
        line = {"accuracy": mean, "problems": problems}
        return line | {f"accuracy_{name}": score for name, score in named.items()}


def grade_samples(
    samples: list[Trajectory], problems: list[Problem], tokenizer: Any
) -> list[Grade]:
    """Return grades of samples written for these problems; a truncated answer is wrong.

    Collective: every rank grades its share, and all know all grades whatever hung where.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    mine = list(zip(samples, problems, strict=True))[rank::world]
    texts = tokenizer.batch_decode([s.response_ids for s, _ in mine], skip_special_tokens=True)
    whole = [i for i, (sample, _) in enumerate(mine) if not sample.truncated]
    answers = [Submission(mine[i][1].grader, texts[i], mine[i][1].answer) for i in whole]
    own = dict(zip(whole, grade(answers), strict=True))
    parts = gather([own.get(i, Grade(0.0)) for i in range(len(mine))])
    return [parts[i % world][i // world] for i in range(len(samples))]


def accuracy(grades: list[Grade]) -> float:
    """Return the share of right answers."""
    return sum(grade.right for grade in grades) / len(grades)
