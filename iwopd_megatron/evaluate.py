"""Accuracy of an engine's answers on held-out problems, seed-matched between runs."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist

from iwopd_megatron.data import Problem, encode_prompt
from iwopd_megatron.grading import grade
from iwopd_megatron.grading_pool import Answer
from iwopd_megatron.parallel import gather
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
            Prompt(i, encode_prompt(tokenizer, p.prompt)) for i, p in enumerate(problems)
        ]
        self.sampling = Sampling(max_tokens, temperature, seed=0, stream=STREAM)

    def accuracy(self, engine: RolloutEngine) -> float:
        """Share of the problems answered right, one answer each. Collective."""
        samples = engine.generate(self.prompts, self.sampling)
        return sum(grade_samples(samples, self.problems, self.tokenizer)) / len(samples)


def grade_samples(
    samples: list[Trajectory], problems: list[Problem], tokenizer: Any
) -> list[float]:
    """Grades of samples written for these problems, in order; a truncated answer is wrong.

    Collective: every rank grades its share and all know all grades, whatever hung where.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    mine = list(zip(samples, problems, strict=True))[rank::world]
    texts = tokenizer.batch_decode([s.response_ids for s, _ in mine], skip_special_tokens=True)
    whole = [i for i, (sample, _) in enumerate(mine) if not sample.truncated]
    answers = [Answer(mine[i][1].grader, texts[i], mine[i][1].answer) for i in whole]
    own = dict(zip(whole, grade(answers), strict=True))
    parts = gather([own.get(i, 0.0) for i in range(len(mine))])
    return [parts[i % world][i // world] for i in range(len(samples))]
