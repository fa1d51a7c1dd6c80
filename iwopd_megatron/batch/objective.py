"""What one micro-batch contributes: its tokens' losses, and the sums its metrics are made of.

Token weights are computed here, from old log-probs. With one optimiser step a round those are this
same forward's, detached, and no extra forward pass is needed. With several they come with the
batch, and then a token's loss is known as soon as its log-prob is (`linear_loss`).
Shapes: T tokens of this rank, N loss tokens, C of them in a chunk.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist

from iwopd_megatron.batch.metrics import BINS, BY_DECILE, BY_POSITION, DECILES, token_means
from iwopd_megatron.batch.packing import MicroBatch, Support
from iwopd_megatron.config.loss import Loss, WeightingRule
from iwopd_megatron.loss.logprobs import LogProbs
from iwopd_megatron.loss.policy import importance_weight, is_clipped, opd_advantage, policy_loss
from iwopd_megatron.loss.topk import topk_kl
from iwopd_megatron.loss.weighting import StepWeighting

Sums = dict[str, torch.Tensor]
Values = dict[str, torch.Tensor]  # [N] each, detached
ALL = slice(None)


class Terms(ABC):
    """A micro-batch's loss with everything fixed but the student's log-probs."""

    @abstractmethod
    def loss(self, logprobs: LogProbs, part: slice = ALL) -> torch.Tensor:
        """Return the scalar loss summed over the tokens of `part`, whose log-probs these are."""

    @abstractmethod
    def sums(self, logprobs: LogProbs, loss: torch.Tensor) -> Sums:
        """Return what metrics are made of, detached: the entries of `metrics.sums_of`."""


class Objective(ABC):
    """What a minibatch is trained on."""

    @property
    @abstractmethod
    def weighting(self) -> StepWeighting:
        """The token weights of this optimiser step."""

    @abstractmethod
    def known_terms(self, batch: MicroBatch) -> Terms | None:
        """Return the terms if they need no log-probs of this forward pass, else None."""

    @abstractmethod
    def terms(self, batch: MicroBatch, own_logp: torch.Tensor) -> Terms:
        """Return the terms; own_logp: `[N]` fp32, this forward pass's, detached."""

    @abstractmethod
    def token_metrics(self, sums: Sums) -> dict[str, Any]:
        """Return the metrics line's means over loss tokens, from sums over all ranks; maybe {}."""


@dataclass(frozen=True)
class DistillationObjective(Objective):
    """IW-OPD on a micro-batch: whole-response weights on the policy loss or on the top-K KL."""

    loss: Loss
    cp_group: dist.ProcessGroup | None
    ratio_mean: torch.Tensor | None = None  # Z_t of the whole optimiser step, for ratio rules
    step: int = 0  # rounds done, of total_steps; for schedule
    total_steps: int = 1
    bin_tokens: int = 1  # of a response, for the metrics by position

    @property
    def weighting(self) -> StepWeighting:
        return StepWeighting(self.loss.weighting, self.step, self.total_steps, self.ratio_mean)

    def known_terms(self, batch: MicroBatch) -> DistillationTerms | None:
        return None if batch.old_logp is None else self._terms(batch, batch.old_logp)

    def terms(self, batch: MicroBatch, own_logp: torch.Tensor) -> DistillationTerms:
        return self._terms(batch, own_logp if batch.old_logp is None else batch.old_logp)

    def _terms(self, batch: MicroBatch, old_N: torch.Tensor) -> DistillationTerms:
        weight_N = self.weights(batch.teacher_logp - old_N, batch)
        kind = TopKTerms if self.loss.objective == "topk_kl" else PolicyTerms
        return kind(self.loss, batch, old_N, weight_N, self.bin_tokens)

    def token_metrics(self, sums: Sums) -> dict[str, Any]:
        return token_means(sums, self.loss.objective) | {"bin_tokens": self.bin_tokens}

    def weights(self, gap_N: torch.Tensor, batch: MicroBatch) -> torch.Tensor:
        """Return weights `[N]` of the loss tokens; prefix sums run over all context shards."""
        gap_T = gap_N.new_zeros(batch.segments.shape).index_copy(0, batch.rows, gap_N)
        mask_T = torch.zeros_like(batch.segments, dtype=torch.bool).index_fill(0, batch.rows, True)
        weight_T = self.weighting.packed(
            gap_T, batch.segments, mask_T, num_segments=batch.num_segments, cp_group=self.cp_group
        )
        return weight_T[batch.rows]


@dataclass(frozen=True)
class DistillationTerms(Terms):
    """What both objectives have: old log-probs, weights, and the metrics of the gap."""

    settings: Loss
    batch: MicroBatch
    old_N: torch.Tensor
    weight_N: torch.Tensor
    bin_tokens: int

    @abstractmethod
    def own_values(self, logprobs: LogProbs) -> Values:
        """Return the values that only this objective has, by their names in `BY_DECILE`."""

    def sums(self, logprobs: LogProbs, loss: torch.Tensor) -> Sums:
        batch, gap_N = self.batch, self.batch.teacher_logp - self.old_N
        values = self.own_values(logprobs) | {
            "tokens": torch.ones_like(gap_N),
            "reverse_kl": -gap_N,
            "weight": self.weight_N,
            "logp": self.old_N,
            "abs_gap": gap_N.abs(),
            "entropy": logprobs.known_entropy().detach(),
            "drift": (self.old_N - batch.rollout_logp).abs(),
        }
        names = BY_DECILE[self.settings.objective]
        table_NM = torch.stack([values[name].float() for name in names], 1)
        bin_N = (batch.offset // self.bin_tokens).clamp(max=BINS - 1)
        return {
            "tokens": torch.tensor(len(gap_N), device=gap_N.device),
            "loss": loss.detach(),
            "deciles": sum_rows(batch.place, table_NM, DECILES),
            "positions": sum_rows(bin_N, table_NM[:, : len(BY_POSITION)], BINS),
        }


class PolicyTerms(DistillationTerms):
    """The policy loss (Eq. 67) of ExOPD's advantages, weighted by the plain gaps' weights."""

    @cached_property
    def advantage_N(self) -> torch.Tensor:
        """Weighted advantages `[N]`, nats."""
        extrapolation = self.settings.extrapolation
        advantage_N = opd_advantage(
            self.batch.teacher_logp,
            self.old_N,
            base_logp=self.batch.base_logp if extrapolation != 1.0 else None,
            extrapolation=extrapolation,
        )
        return self.weight_N * advantage_N

    def loss(self, logprobs: LogProbs, part: slice = ALL) -> torch.Tensor:
        return policy_loss(
            logprobs.logp,
            self.old_N[part],
            self.advantage_N[part],
            torch.ones_like(logprobs.logp, dtype=torch.bool),
            clip=self.settings.clip,
            dual_clip=self.settings.dual_clip,
            rollout_logp=self.batch.rollout_logp[part],
            tis_cap=self.settings.tis_cap,
            denominator=self.batch.denominator[part],
        )

    def own_values(self, logprobs: LogProbs) -> Values:
        cap = self.settings.tis_cap or float("inf")
        correction_N = importance_weight(self.old_N, self.batch.rollout_logp, cap)
        clipped_N = is_clipped(logprobs.logp, self.old_N, self.advantage_N, self.settings.clip)
        return {"clipped": clipped_N, "tis_capped": correction_N >= cap}


class TopKTerms(DistillationTerms):
    """The dense variant: no sampled token in it, hence neither ratio nor importance weight."""

    def loss(self, logprobs: LogProbs, part: slice = ALL) -> torch.Tensor:
        _, student_CK = logprobs.known_topk()
        kl_C = self._kl(student_CK, part)
        return (self.weight_N[part] * kl_C / self.batch.denominator[part]).sum()

    def own_values(self, logprobs: LogProbs) -> Values:
        student_NK = logprobs.known_topk()[1].detach()
        return {
            "topk_kl": self._kl(student_NK, ALL),
            "topk_mass_teacher": self._support.logp.exp().sum(1),
            "topk_mass_student": student_NK.exp().sum(1),
            "topk_hit": self._support.ids.eq(self.batch.targets[:, None]).any(1),
        }

    @property
    def _support(self) -> Support:
        if self.batch.support is None:
            raise ValueError("objective topk_kl needs a teacher's support with every micro-batch.")
        return self.batch.support

    def _kl(self, student_CK: torch.Tensor, part: slice) -> torch.Tensor:
        return topk_kl(student_CK, self._support.logp[part], self.settings.topk.support)


class LikelihoodObjective(Objective):
    """Supervised fine-tuning on given responses: every loss token weighs the same."""

    @property
    def weighting(self) -> StepWeighting:
        return StepWeighting(WeightingRule(rule="uniform"))

    def known_terms(self, batch: MicroBatch) -> LikelihoodTerms:
        return LikelihoodTerms(batch)

    def terms(self, batch: MicroBatch, own_logp: torch.Tensor) -> LikelihoodTerms:
        return LikelihoodTerms(batch)

    def token_metrics(self, sums: Sums) -> dict[str, Any]:
        return {}


@dataclass(frozen=True)
class LikelihoodTerms(Terms):
    """The negative log-likelihood of the responses."""

    batch: MicroBatch

    def loss(self, logprobs: LogProbs, part: slice = ALL) -> torch.Tensor:
        return -(logprobs.logp / self.batch.denominator[part]).sum()

    def sums(self, logprobs: LogProbs, loss: torch.Tensor) -> Sums:
        tokens = torch.tensor(len(self.batch.rows), device=loss.device)
        return {"tokens": tokens, "loss": loss.detach()}


def sum_rows(place_N: torch.Tensor, table_NM: torch.Tensor, places: int) -> torch.Tensor:
    """Return sums `[places, M]` of the rows `[N, M]` that have the same place."""
    return table_NM.new_zeros(places, table_NM.shape[1]).index_add_(0, place_N, table_NM)
