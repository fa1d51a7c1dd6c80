"""What a round's samples are trained on: masks, the scores of every model, minibatches.

The student's own answers are scored by the teacher, by ExOPD's base student where the loss reads
it, and, before a round of several optimiser steps, by the student itself.
"""

from __future__ import annotations

from typing import Any

from transformers import AutoTokenizer

from iwopd_megatron import device, gates
from iwopd_megatron.config import Recipe
from iwopd_megatron.config_models import Frozen
from iwopd_megatron.minibatch import Minibatch
from iwopd_megatron.objective import DistillationObjective, LikelihoodObjective
from iwopd_megatron.packing import Packer, deal
from iwopd_megatron.preflight import eos_ids
from iwopd_megatron.student import Student
from iwopd_megatron.teacher import EmbeddedScorer
from iwopd_megatron.trajectory import Trajectory, mask_tokens
from iwopd_megatron.weighting import RATIO_RULES, ratio_mean


class Supervision:
    """Teacher and base student of a recipe, and how they make minibatches of samples."""

    def __init__(self, recipe: Recipe, student: Student, packer: Packer, tokenizer: Any):
        self.recipe, self.student, self.packer, self.tokenizer = recipe, student, packer, tokenizer
        self.teacher = self._scorer(recipe.teacher)
        self.base = self._scorer(recipe.base_model)
        mode = recipe.loss.mask_special_tokens
        special = set() if mode == "none" else set(tokenizer.all_special_ids)
        self.unread = special - eos_ids(recipe.student.hf) if mode == "all_but_eos" else special

    def _scorer(self, settings: Frozen | None) -> EmbeddedScorer | None:
        if settings is None:
            return None
        student, tokenizer = self.recipe.student.hf, AutoTokenizer.from_pretrained(settings.hf)
        gates.same_vocabulary(student, settings.hf, self.tokenizer, tokenizer)
        return EmbeddedScorer(settings, self.packer, self.recipe.rollout.temperature)

    @property
    def models(self) -> dict[str, Student | EmbeddedScorer]:
        """All models of the trainer's processes, by role."""
        every = {"student": self.student, "teacher": self.teacher, "base": self.base}
        return {role: model for role, model in every.items() if model is not None}

    def masked(self, sample: Trajectory) -> Trajectory:
        """Without what the recipe keeps from every loss; before any scoring."""
        return mask_tokens(sample, self.unread, self.recipe.loss.mask_truncated)

    def begin(self, sample: Trajectory) -> None:
        pass

    def minibatches(self, samples: list[Trajectory], round_number: int) -> list[Minibatch]:
        """The round's samples with all their scores, one part an optimiser step. Collective."""
        parts = deal(samples, self.recipe.train.minibatches)
        if self.teacher is None:
            return [Minibatch(part, LikelihoodObjective()) for part in parts]
        minibatches = [self._scored(part, round_number) for part in parts]
        for minibatch in minibatches:
            gates.teacher_scores(minibatch.samples, self.student.hf["vocab_size"])
        return minibatches

    def _scored(self, samples: list[Trajectory], round_number: int) -> Minibatch:
        loss, weighting = self.recipe.loss, self.recipe.loss.weighting
        topk = loss.topk.k if loss.objective == "topk_kl" else 0
        teacher, support = self.teacher.score(samples, topk)
        scores = {"teacher_logp": teacher}
        if self.base is not None:
            scores["base_logp"], _ = self.base.score(samples)
        if self.recipe.steps_per_round > 1:
            scores["old_logp"] = self.student.score(samples, self.packer)
        samples = [
            sample.with_scores(**dict(zip(scores, values, strict=True)))
            for sample, *values in zip(samples, *scores.values(), strict=True)
        ]
        mean = None
        if weighting.rule in RATIO_RULES:  # Z_t from log-probs that every rank knows
            mean = ratio_mean([sample.gaps() for sample in samples], weighting.alpha)
            mean = mean.to(device.current_device())
        progress = round_number - 1, self.recipe.train.rounds
        cp_group = self.packer.parallel.cp.group
        return Minibatch(samples, DistillationObjective(loss, cp_group, mean, *progress), support)
