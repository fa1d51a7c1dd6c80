"""What one micro-batch contributes: log-probs -> loss and the sums its metrics are made of.

Token weights are computed here. With one optimiser step a round the old log-probs are this same
forward's, detached, and no extra forward pass is needed; with several they come with the batch.
Shapes: T tokens of this rank, N loss tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from iwopd_megatron.config import Loss
from iwopd_megatron.logprobs import LogProbs
from iwopd_megatron.loss import importance_weight, is_clipped, opd_advantage, policy_loss
from iwopd_megatron.packing import MicroBatch
from iwopd_megatron.topk import topk_kl
from iwopd_megatron.weighting import token_weights_packed

Sums = dict[str, torch.Tensor]


@dataclass(frozen=True)
class DistillationObjective:
    """IW-OPD on a micro-batch: whole-response weights on the policy loss or on the top-K KL."""

    loss: Loss
    cp_group: dist.ProcessGroup | None
    ratio_mean: torch.Tensor | None = None  # Z_t of the whole optimiser step, for ratio rules
    step: int = 0  # rounds done, of total_steps; for schedule
    total_steps: int = 1

    @property
    def weighting(self) -> dict[str, Any]:
        """What `token_weights_packed` needs beside the tokens."""
        progress = {"step": self.step, "total_steps": self.total_steps}
        return {**self.loss.weighting.model_dump(), **progress, "ratio_mean": self.ratio_mean}

    def __call__(self, logprobs: LogProbs, batch: MicroBatch) -> tuple[torch.Tensor, Sums]:
        old_logp = logprobs.logp.detach() if batch.old_logp is None else batch.old_logp
        gap_N = batch.teacher_logp - old_logp
        weight_N = self.weights(gap_N, batch)
        term = self._topk_kl if self.loss.objective == "topk_kl" else self._policy
        value, sums = term(logprobs, batch, old_logp, weight_N)
        drift_N = (old_logp - batch.rollout_logp).abs()
        return value, sums | {
            "tokens": torch.tensor(len(gap_N), device=gap_N.device),
            "loss": value.detach(),
            "gap": gap_N.sum(),
            "abs_gap": gap_N.abs().sum(),
            "weight": weight_N.sum(),
            "entropy": logprobs.entropy.detach().sum(),
            "drift": drift_N.sum(),
            "decile_tokens": by_decile(batch.place, torch.ones_like(gap_N)),
            "gap_deciles": by_decile(batch.place, gap_N.abs()),
            "weight_deciles": by_decile(batch.place, weight_N),
        }

    def _policy(
        self, logprobs: LogProbs, batch: MicroBatch, old_logp: torch.Tensor, weight_N: torch.Tensor
    ) -> tuple[torch.Tensor, Sums]:
        """Eq. 67 with weighted advantages; ExOPD's advantage, the plain gap's weight."""
        settings = self.loss
        exopd = settings.extrapolation != 1.0
        advantage_N = weight_N * opd_advantage(
            batch.teacher_logp,
            old_logp,
            base_logp=batch.base_logp if exopd else None,
            extrapolation=settings.extrapolation,
        )
        value = policy_loss(
            logprobs.logp,
            old_logp,
            advantage_N,
            torch.ones_like(advantage_N, dtype=torch.bool),
            clip=settings.clip,
            dual_clip=settings.dual_clip,
            rollout_logp=batch.rollout_logp,
            tis_cap=settings.tis_cap,
            denominator=batch.denominator,
        )
        cap = settings.tis_cap or float("inf")
        correction_N = importance_weight(old_logp, batch.rollout_logp, cap)
        return value, {
            "clipped": is_clipped(logprobs.logp, old_logp, advantage_N, settings.clip).sum(),
            "tis_capped": (correction_N >= cap).sum(),
        }

    def _topk_kl(
        self, logprobs: LogProbs, batch: MicroBatch, old_logp: torch.Tensor, weight_N: torch.Tensor
    ) -> tuple[torch.Tensor, Sums]:
        """The dense variant: no sampled token in it, hence neither ratio nor importance weight."""
        kl_N = topk_kl(logprobs.topk_logp, batch.topk_logp, self.loss.topk.support)
        return (weight_N * kl_N / batch.denominator).sum(), {
            "topk_kl": kl_N.detach().sum(),
            "topk_mass_teacher": batch.topk_logp.exp().sum(),
            "topk_mass_student": logprobs.topk_logp.detach().exp().sum(),
            "topk_hit": (batch.topk_ids == batch.targets[:, None]).sum(),
        }

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


def nll_objective(logprobs: LogProbs, batch: MicroBatch) -> tuple[torch.Tensor, Sums]:
    """Supervised fine-tuning: the negative log-likelihood of the given responses."""
    value = -(logprobs.logp / batch.denominator).sum()
    return value, {
        "tokens": torch.tensor(len(batch.rows), device=value.device),
        "loss": value.detach(),
    }


def by_decile(place_N: torch.Tensor, value_N: torch.Tensor) -> torch.Tensor:
    """Sums `[10]` of a value over the tenths of the responses."""
    return torch.zeros(10, device=place_N.device).index_add_(0, place_N, value_N.float())
