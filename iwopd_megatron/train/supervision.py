"""What a round's samples are trained on: masks, the scores of every model, minibatches.

`Distillation` is of the student's own answers, `FineTuning` of given responses.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from iwopd_megatron.batch import gates
from iwopd_megatron.batch.metrics import bin_tokens, distance_means
from iwopd_megatron.batch.minibatch import Minibatch
from iwopd_megatron.batch.objective import DistillationObjective, LikelihoodObjective
from iwopd_megatron.batch.packing import Packer, deal
from iwopd_megatron.batch.trajectory import Trajectory, mask_tokens
from iwopd_megatron.config.recipe import Recipe
from iwopd_megatron.hf.folder import eos_ids
from iwopd_megatron.loss.weighting import RATIO_RULES, ratio_mean
from iwopd_megatron.runtime import device
from iwopd_megatron.teacher.embedded import EmbeddedScorer
from iwopd_megatron.teacher.teachers import Teachers
from iwopd_megatron.train.student import StudentModel


class Supervision(ABC):
    """Makes minibatches of a round's samples, and owns the models that score them."""

    def __init__(self, recipe: Recipe, student: StudentModel, packer: Packer, tokenizer: Any):
        """Load the models that score, or wait until they answer. Collective."""
        self.recipe, self.student, self.packer = recipe, student, packer
        mode = recipe.loss.mask_special_tokens
        special = set() if mode == "none" else set(tokenizer.all_special_ids)
        self.unread = special - eos_ids(recipe.student.hf) if mode == "all_but_eos" else special

    @property
    def models(self) -> dict[str, StudentModel | EmbeddedScorer]:
        """All models of the trainer's processes, by role."""
        return {"student": self.student}

    def masked(self, sample: Trajectory) -> Trajectory:
        """Return the sample with the recipe's loss mask; this comes before any scoring."""
        return mask_tokens(sample, self.unread, self.recipe.loss.mask_truncated)

    @abstractmethod
    def minibatches(self, samples: list[Trajectory], round_number: int) -> list[Minibatch]:
        """Return the round's masked samples with all their scores, in order. Collective.

        One part for each optimiser step of an epoch.
        """

    def check(self, minibatches: list[Minibatch]) -> None:
        """GateError unless the scores are possible ones."""
        return None

    def distance(self, samples: list[Trajectory]) -> dict[str, Any]:
        """Return how far the student's answers are from a teacher's; {} without one. Collective."""
        return {}

    def begin(self, sample: Trajectory) -> None:
        """Start scoring an answer that has ended, where a remote teacher can.

        `minibatches` awaits it. On rank 0 only, maybe in another thread.
        """
        return None

    def scored_early(self, samples: list[Trajectory]) -> float | None:
        """Return the share of the samples that is scored already; None where none can be.

        Rank 0 only, once all samples are there.
        """
        return None

    def close(self) -> None:
        """Stop what was started beside the trainer's processes; no-op when nothing was."""
        return None


class FineTuning(Supervision):
    """Maximum likelihood of given responses; no model scores."""

    def minibatches(self, samples: list[Trajectory], round_number: int) -> list[Minibatch]:
        """Return the samples as they are, dealt into minibatches."""
        parts = deal(samples, self.recipe.train.minibatches)
        return [Minibatch(part, LikelihoodObjective()) for part in parts]


class Distillation(Supervision):
    """The student's own answers, scored by the teacher.

    Also by ExOPD's base student where the loss reads it, and by the student itself before a round
    of several optimiser steps.
    """

    def __init__(self, recipe: Recipe, student: StudentModel, packer: Packer, tokenizer: Any):
        super().__init__(recipe, student, packer, tokenizer)
        self.teachers = Teachers(recipe, packer, tokenizer)
        base, temperature = recipe.base_model, recipe.rollout.temperature
        self.base = None if base is None else EmbeddedScorer(base, packer, temperature)

    @property
    def models(self) -> dict[str, StudentModel | EmbeddedScorer]:
        """The student, embedded teachers as "teacher" or "teacher SOURCE", and the base student."""
        embedded = self.teachers.embedded.items()
        named = {f"teacher {source}".strip(): model for source, model in embedded}
        base = {} if self.base is None else {"base": self.base}
        return super().models | named | base

    def check(self, minibatches: list[Minibatch]) -> None:
        """GateError where a teacher's log-probs are missing, impossible or all the same."""
        for minibatch in minibatches:
            gates.teacher_scores(minibatch.samples, self.student.hf.vocab_size)

    def distance(self, samples: list[Trajectory]) -> dict[str, Any]:
        """Return `distance_means` of the student's answers, at the rollouts' temperature."""
        teacher, _ = self.teachers.score_samples(samples, 0)
        student = self.student.score(samples, self.packer)
        longest = self.recipe.rollout.max_response_tokens
        return distance_means(samples, student, teacher, longest)

    def begin(self, sample: Trajectory) -> None:
        """Start scoring an answer that has ended, unless `rollout.stream_scoring` is off."""
        if self.recipe.rollout.stream_scoring:
            self.teachers.begin(self.masked(sample), self.recipe.topk)

    def scored_early(self, samples: list[Trajectory]) -> float | None:
        """Return the remote teachers' share; None where all teachers are embedded."""
        return self.teachers.scored_early(samples, self.recipe.topk)

    def close(self) -> None:
        """Stop the teacher services that the run started."""
        self.teachers.close()

    def minibatches(self, samples: list[Trajectory], round_number: int) -> list[Minibatch]:
        """Return the minibatches, scored one after the other. Collective."""
        parts = deal(samples, self.recipe.train.minibatches)
        return [self._scored(part, round_number) for part in parts]

    def _scored(self, samples: list[Trajectory], round_number: int) -> Minibatch:
        loss, weighting = self.recipe.loss, self.recipe.loss.weighting
        teacher, support = self.teachers.score_samples(samples, self.recipe.topk)
        scores = {"teacher_logp": teacher}
        if self.base is not None:
            scores["base_logp"], _ = self.base.score_samples(samples)
        if self.recipe.steps_per_round > 1:
            scores["old_logp"] = self.student.score(samples, self.packer)
        samples = [
            sample.with_scores(**dict(zip(scores, values, strict=True)))
            for sample, *values in zip(samples, *scores.values(), strict=True)
        ]
        if self.recipe.gates.on_bad_sample == "drop":
            samples = gates.without_bad_scores(samples)
        mean = None
        if weighting.rule in RATIO_RULES:  # Z_t from log-probs that every rank knows
            mean = ratio_mean([sample.gaps() for sample in samples], weighting.alpha)
            mean = mean.to(device.current_device())
        progress = round_number - 1, self.recipe.train.rounds
        width = bin_tokens(self.recipe.rollout.max_response_tokens)
        cp_group = self.packer.parallel.cp.group
        objective = DistillationObjective(loss, cp_group, mean, *progress, width)
        return Minibatch(samples, objective, support)


def make_supervision(
    recipe: Recipe, student: StudentModel, packer: Packer, tokenizer: Any
) -> Supervision:
    """Return the supervision a recipe asks for, its teachers loaded or answering. Collective."""
    kind = Distillation if recipe.is_distilling else FineTuning
    return kind(recipe, student, packer, tokenizer)
