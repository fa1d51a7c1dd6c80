"""A round's problems, next in the data order, and the answers to them.

Answers come from the round's journal (after a crash), from generation started during the round
before (`rollout.max_staleness: 1`), or from the engine now; or from the data file.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from iwopd_megatron.batch.trajectory import Trajectory
from iwopd_megatron.config.recipe import Recipe
from iwopd_megatron.data.problems import Order, Problem
from iwopd_megatron.hf.answer_end import end_id, response_ids
from iwopd_megatron.rollout.engine import OnSample, Prompt, RolloutEngine, Sampling
from iwopd_megatron.runtime.parallel import Parallel
from iwopd_megatron.train.journal import Journal


@dataclass(frozen=True)
class Draw:
    """What a round asks for: problems, a prompt of each in that order, and how to sample."""

    round: int
    problems: list[Problem]
    prompts: list[Prompt]
    sampling: Sampling


class Collector:
    """Draws each round's problems and collects its answers.

    Every rank calls it; the journal and `on_sample` are rank 0's.
    """

    def __init__(
        self,
        recipe: Recipe,
        parallel: Parallel,
        problems: list[tuple[Problem, list[int]]],
        order: Order,
        engine: RolloutEngine,
        on_sample: OnSample,
    ):
        """problems: each with its prompt's ids; on_sample: called with each answer when it ends."""
        self.recipe, self.parallel, self.problems = recipe, parallel, problems
        self.engine, self.on_sample = engine, on_sample
        self.order = order
        self.journal = None if recipe.rollout.engine == "hf" else Journal(recipe.out)
        self.ahead: Draw | None = None

    @property
    def cursor(self) -> int:
        """The data order's cursor after the last round that was answered."""
        return self.order.cursor - (0 if self.ahead is None else len(self.ahead.prompts))

    def take(self) -> list[tuple[Problem, list[int]]]:
        """Return the next round's problems, each with its prompt's ids."""
        chosen = self.order.take(self.recipe.train.prompts_per_round)
        return [self.problems[i] for i in chosen]

    def given(self, tokenizer: Any) -> tuple[list[Problem], list[Trajectory]]:
        """Return the round's problems and the data file's responses to them."""
        taken, end = self.take(), end_id(self.recipe.student.hf, tokenizer)
        samples = [
            Trajectory(place, ids, response_ids(problem.target, end, tokenizer))
            for place, (problem, ids) in enumerate(taken)
        ]
        return [problem for problem, _ in taken], samples

    def answers(self, round_number: int) -> tuple[list[Problem], list[Trajectory]]:
        """Return the round's problems and one answer to each, in order. Collective."""
        draw, self.ahead = self.ahead or self._draw(round_number), None
        known = self.parallel.on_main(lambda: self._known(draw))
        missing = [prompt for prompt in draw.prompts if prompt.index not in known]
        fresh = self.engine.generate(missing, draw.sampling, self._keeper(draw))
        by_index = known | {sample.index: sample for sample in fresh}
        return draw.problems, [by_index[prompt.index] for prompt in draw.prompts]

    def prefetch(self, round_number: int) -> None:
        """Start the next round's generation, to go on while this round trains."""
        self.ahead = self._draw(round_number)
        self.engine.prefetch(self.ahead.prompts, self.ahead.sampling, self._keeper(self.ahead))

    def end_round(self, round_number: int) -> None:
        """Forget the journal of a round that is trained on and recorded."""
        if self.journal is not None and self.parallel.is_main:
            self.journal.forget(round_number)

    def _draw(self, round_number: int) -> Draw:
        rollout, taken = self.recipe.rollout, self.take()
        prompts = [Prompt(place, ids, problem.source) for place, (problem, ids) in enumerate(taken)]
        sampling = Sampling(
            rollout.max_response_tokens,
            rollout.temperature,
            rollout.top_p,
            self.recipe.train.seed,
            round_number,
            rollout.routing_replay,
        )
        return Draw(round_number, [problem for problem, _ in taken], prompts, sampling)

    def _known(self, draw: Draw) -> dict[int, Trajectory]:
        """Return the journal's answers by index, each passed to `on_sample`."""
        if self.journal is None:
            return {}
        known = self.journal.read(draw.round, draw.prompts)
        for sample in known.values():
            self.on_sample(sample)
        return known

    def _keeper(self, draw: Draw) -> OnSample:
        """Return what is called with each answer that ends: keep it, then tell `on_sample`."""

        def keep(sample: Trajectory) -> None:
            if self.journal is not None:
                self.journal.add(draw.round, sample)
            self.on_sample(sample)

        return keep
