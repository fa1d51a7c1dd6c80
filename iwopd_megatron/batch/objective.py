"""What one micro-batch contributes: its tokens' losses, and the sums its metrics are made of.

Token weights are computed here, from old log-probs. With one optimiser step a round those are this
same forward's, detached, and no extra forward pass is needed. With several they come with the
batch, and then a token's loss is known as soon as its log-prob is (`linear_loss`).
Shapes: T tokens of this rank, N loss tokens, C of them in a chunk.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import torch
import torch.distributed as dist

from iwopd_megatron.batch.metrics import BINS, BY_DECILE, BY_POSITION, DECILES
from iwopd_megatron.batch.packing import MicroBatch
from iwopd_megatron.config.loss import Loss
from iwopd_megatron.loss.logprobs import LogProbs
from iwopd_megatron.loss.policy import importance_weight, is_clipped, opd_advantage, policy_loss
from iwopd_megatron.loss.topk import topk_kl
from iwopd_megatron.loss.weighting import token_weights_packed

Sums = dict[str, torch.Tensor]
Values = dict[str, torch.Tensor]  # [N] each, detached
ALL = slice(None)


class Terms(Protocol):
    """A micro-batch's loss with everything fixed but the student's log-probs."""

    def loss(self, logprobs: LogProbs, part: slice = ALL) -> torch.Tensor:
        """Summed over the tokens of `part`, whose log-probs these are."""
        ...

    def sums(self, logprobs: LogProbs, loss: torch.Tensor) -> Sums:
        """What metrics are made of, detached."""
        ...


class Objective(Protocol):
    """What a minibatch is trained on."""

    def is_known(self, batch: MicroBatch) -> bool:
        """Whether `terms` needs no log-probs of this forward pass."""
        ...

    def terms(self, batch: MicroBatch, own_logp: torch.Tensor | None = None) -> Terms:
        """own_logp: `[N]`, this forward's, detached; None if `is_known`."""
        ...


@dataclass(frozen=True)
class DistillationObjective:
    """IW-OPD on a micro-batch: whole-response weights on the policy loss or on the top-K KL."""

    loss: Loss
    cp_group: dist.ProcessGroup | None
    ratio_mean: torch.Tensor | None = None  # Z_t of the whole optimiser step, for ratio rules
    step: int = 0  # rounds done, of total_steps; for schedule
    total_steps: int = 1
    bin_tokens: int = 1  # of a response, for the metrics by position

    @property
    def weighting(self) -> dict[str, Any]:
        """What `token_weights_packed` needs beside the tokens."""
        progress = {"step": self.step, "total_steps": self.total_steps}
        return {**self.loss.weighting.model_dump(), **progress, "ratio_mean": self.ratio_mean}

    def is_known(self, batch: MicroBatch) -> bool:
        return batch.old_logp is not None

    def terms(self, batch: MicroBatch, own_logp: torch.Tensor | None = None) -> DistillationTerms:
        old_N = own_logp if batch.old_logp is None else batch.old_logp
        weight_N = self.weights(batch.teacher_logp - old_N, batch)
        kind = TopKTerms if self.loss.objective == "topk_kl" else PolicyTerms
        return kind(self.loss, batch, old_N, weight_N, self.bin_tokens)

    def weights(self, gap_N: torch.Tensor, batch: MicroBatch) -> torch.Tensor:
        """Token weights of the loss tokens; prefix sums run over all context-parallel shards."""
        gap_T = gap_N.new_zeros(batch.segments.shape).index_copy(0, batch.rows, gap_N)
        mask_T = torch.zeros_like(batch.segments, dtype=torch.bool).index_fill(0, batch.rows, True)
        weight_T = token_weights_packed(
            gap_T,
            batch.segments,
            mask_T,
            num_segments=batch.num_segments,
            cp_group=self.cp_group,
            **self.weighting,
        )
        return weight_T[batch.rows]


@dataclass(frozen=True)
class DistillationTerms:
    """What both objectives have: old log-probs, weights, and the metrics of the gap."""

    settings: Loss
    batch: MicroBatch
    old_N: torch.Tensor
    weight_N: torch.Tensor
    bin_tokens: int

    def sums(self, logprobs: LogProbs, loss: torch.Tensor) -> Sums:
        batch, gap_N = self.batch, self.batch.teacher_logp - self.old_N
        values = self.own_values(logprobs) | {
            "tokens": torch.ones_like(gap_N),
            "reverse_kl": -gap_N,
            "weight": self.weight_N,
            "logp": self.old_N,
            "abs_gap": gap_N.abs(),
            "entropy": logprobs.entropy.detach(),
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
    """Eq. 67 with weighted advantages; ExOPD's advantage, the plain gap's weight."""

    @cached_property
    def advantage_N(self) -> torch.Tensor:
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
        kl_C = self._kl(logprobs.topk_logp, part)
        return (self.weight_N[part] * kl_C / self.batch.denominator[part]).sum()

    def own_values(self, logprobs: LogProbs) -> Values:
        teacher_NK, student_NK = self.batch.topk_logp, logprobs.topk_logp.detach()
        return {
            "topk_kl": self._kl(student_NK, ALL),
            "topk_mass_teacher": teacher_NK.exp().sum(1),
            "topk_mass_student": student_NK.exp().sum(1),
            "topk_hit": (self.batch.topk_ids == self.batch.targets[:, None]).any(1),
        }

    def _kl(self, student_CK: torch.Tensor, part: slice) -> torch.Tensor:
        return topk_kl(student_CK, self.batch.topk_logp[part], self.settings.topk.support)


class LikelihoodObjective:
    """Supervised fine-tuning on given responses."""

    def is_known(self, batch: MicroBatch) -> bool:
        return True

    def terms(self, batch: MicroBatch, own_logp: torch.Tensor | None = None) -> LikelihoodTerms:
        return LikelihoodTerms(batch)


@dataclass(frozen=True)
class LikelihoodTerms:
    """The negative log-likelihood of the responses."""

    batch: MicroBatch

    def loss(self, logprobs: LogProbs, part: slice = ALL) -> torch.Tensor:
        return -(logprobs.logp / self.batch.denominator[part]).sum()

    def sums(self, logprobs: LogProbs, loss: torch.Tensor) -> Sums:
        tokens = torch.tensor(len(self.batch.rows), device=loss.device)
        return {"tokens": tokens, "loss": loss.detach()}


def sum_rows(place_N: torch.Tensor, table_NM: torch.Tensor, places: int) -> torch.Tensor:
    """Sums `[places, M]` of the rows that have the same place."""
    return table_NM.new_zeros(places, table_NM.shape[1]).index_add_(0, place_N, table_NM)
