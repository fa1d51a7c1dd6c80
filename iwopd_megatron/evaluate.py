"""Accuracy of an engine's answers on held-out problems, seed-matched between runs."""

from __future__ import annotations

from typing import Any

from iwopd_megatron.data import Problem, encode_prompt
from iwopd_megatron.grading import grade
from iwopd_megatron.rollout import Prompt, RolloutEngine, Sampling
from iwopd_megatron.trajectory import Trajectory

STREAM = 2**32 - 1  # random numbers no training round uses


class Evaluator:
    """The same problems and the same random numbers every time it runs."""

    def __init__(
        self, problems: list[Problem], tokenizer: Any, max_tokens: int, temperature: float
    ):
        self.problems, self.tokenizer = problems, tokenizer
        self.prompts = [
            Prompt(i, encode_prompt(tokenizer, p.question)) for i, p in enumerate(problems)
        ]
        self.sampling = Sampling(max_tokens, temperature, seed=0, stream=STREAM)

    def accuracy(self, engine: RolloutEngine) -> float:
        """Share of the problems answered right, one answer each. Collective."""
        samples = engine.generate(self.prompts, self.sampling)
        return sum(grade_samples(samples, self.problems, self.tokenizer)) / len(samples)


def grade_samples(
    samples: list[Trajectory], problems: list[Problem], tokenizer: Any
) -> list[float]:
    """Grades of samples written for these problems, in order; a truncated answer is wrong."""
    texts = tokenizer.batch_decode([s.response_ids for s in samples], skip_special_tokens=True)
    return [
        0.0 if sample.truncated else grade(problem.source, text, problem.answer)
        for sample, problem, text in zip(samples, problems, texts, strict=True)
    ]
