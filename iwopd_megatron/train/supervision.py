"""What a round's samples are trained on: masks, the scores of every model, minibatches.

The student's own answers are scored by the teacher, by ExOPD's base student where the loss reads
it, and, before a round of several optimiser steps, by the student itself.
"""

from __future__ import annotations

from typing import Any

from iwopd_megatron.batch import gates
from iwopd_megatron.batch.metrics import bin_tokens
from iwopd_megatron.batch.minibatch import Minibatch
from iwopd_megatron.batch.objective import DistillationObjective, LikelihoodObjective
from iwopd_megatron.batch.packing import Packer, deal
from iwopd_megatron.batch.trajectory import Trajectory, mask_tokens
from iwopd_megatron.config.models import Frozen
from iwopd_megatron.config.recipe import Recipe
from iwopd_megatron.hf.folder import eos_ids
from iwopd_megatron.loss.weighting import RATIO_RULES, ratio_mean
from iwopd_megatron.runtime import device
from iwopd_megatron.teacher.embedded import EmbeddedScorer
from iwopd_megatron.teacher.teachers import Teachers
from iwopd_megatron.train.student import Student


class Supervision:
    """Teacher and base student of a recipe, and how they make minibatches of samples."""

    def __init__(self, recipe: Recipe, student: Student, packer: Packer, tokenizer: Any):
        self.recipe, self.student, self.packer, self.tokenizer = recipe, student, packer, tokenizer
        self.teachers = Teachers(recipe, packer, tokenizer) if recipe.is_distilling else None
        self.base = self._base(recipe.base_model)
        mode = recipe.loss.mask_special_tokens
        special = set() if mode == "none" else set(tokenizer.all_special_ids)
        self.unread = special - eos_ids(recipe.student.hf) if mode == "all_but_eos" else special

    def _base(self, settings: Frozen | None) -> EmbeddedScorer | None:
        if settings is None:
            return None
        return EmbeddedScorer(settings, self.packer, self.recipe.rollout.temperature)

    @property
    def models(self) -> dict[str, Student | EmbeddedScorer]:
        """All models of the trainer's processes, by role."""
        teachers = self.teachers.embedded if self.teachers is not None else {}
        named = {f"teacher {source}".strip(): model for source, model in teachers.items()}
        base = {"base": self.base} if self.base is not None else {}
        return {"student": self.student} | named | base

    def masked(self, sample: Trajectory) -> Trajectory:
        """Without what the recipe keeps from every loss; before any scoring."""
        return mask_tokens(sample, self.unread, self.recipe.loss.mask_truncated)

    @property
    def topk(self) -> int:
        """Likeliest tokens that the loss wants of a teacher."""
        return self.recipe.loss.topk.k if self.recipe.loss.objective == "topk_kl" else 0

    def begin(self, sample: Trajectory) -> None:
        """Start scoring a sample, masked and with its source, as soon as it is there.

        Rank 0 only; `minibatches` awaits it. Does nothing where the teacher is embedded.
        """
        self.teachers.begin(sample, self.topk)

    def scored_early(self, samples: list[Trajectory]) -> float | None:
        """Share of a round's samples whose scoring generation hid; None where nothing could."""
        return self.teachers and self.teachers.scored_early(samples, self.topk)

    def close(self) -> None:
        """Stop what was started beside the trainer's processes; no-op when nothing was."""
        if self.teachers is not None:
            self.teachers.close()

    def minibatches(self, samples: list[Trajectory], round_number: int) -> list[Minibatch]:
        """The round's samples with all their scores, one part an optimiser step. Collective."""
        parts = deal(samples, self.recipe.train.minibatches)
        if self.teachers is None:
            return [Minibatch(part, LikelihoodObjective()) for part in parts]
        minibatches = [self._scored(part, round_number) for part in parts]
        for minibatch in minibatches:
            gates.teacher_scores(minibatch.samples, self.student.hf.vocab_size)
        return minibatches

    def _scored(self, samples: list[Trajectory], round_number: int) -> Minibatch:
        loss, weighting = self.recipe.loss, self.recipe.loss.weighting
        teacher, support = self.teachers.score_samples(samples, self.topk)
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
