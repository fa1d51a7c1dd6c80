"""What one micro-batch contributes: log-probs -> loss and the sums its metrics are made of.

Token weights are computed here, from the same forward's detached log-probs: with one optimiser step
a round they are the old log-probs, and no extra forward pass is needed. Shapes: T tokens of this
rank, N loss tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from iwopd_megatron.config import Loss
from iwopd_megatron.logprobs import LogProbs
from iwopd_megatron.loss import importance_weight, opd_advantage, policy_loss
from iwopd_megatron.trajectory import MicroBatch
from iwopd_megatron.weighting import token_weights_packed

Sums = dict[str, torch.Tensor]


@dataclass(frozen=True)
class PolicyObjective:
    """IW-OPD on a micro-batch: whole-response weights, advantage, clipped and corrected loss."""

    loss: Loss
    cp_group: dist.ProcessGroup | None
    ratio_mean: torch.Tensor | None = None  # Z_t of the whole step, for ratio rules
    step: int = 0  # optimiser steps done, of total_steps; for schedule
    total_steps: int = 1

    @property
    def weighting(self) -> dict[str, Any]:
        """What `token_weights_packed` needs beside the tokens."""
        progress = {"step": self.step, "total_steps": self.total_steps}
        return {**self.loss.weighting.model_dump(), **progress, "ratio_mean": self.ratio_mean}

    def __call__(self, logprobs: LogProbs, batch: MicroBatch) -> tuple[torch.Tensor, Sums]:
        old_logp = logprobs.logp.detach()
        gap_N = batch.teacher_logp - old_logp
        weight_N = self.weights(gap_N, batch)
        mask_N = torch.ones_like(gap_N, dtype=torch.bool)
        value = policy_loss(
            logprobs.logp,
            old_logp,
            weight_N * opd_advantage(batch.teacher_logp, old_logp),
            mask_N,
            clip=self.loss.clip,
            rollout_logp=batch.rollout_logp,
            tis_cap=self.loss.tis_cap,
            denominator=batch.denominator,
        )
        correction_N = importance_weight(old_logp, batch.rollout_logp, self.loss.tis_cap)
        drift_N = (old_logp - batch.rollout_logp).abs()
        return value, {
            "tokens": mask_N.sum(),
            "loss": value.detach(),
            "gap": gap_N.sum(),
            "abs_gap": gap_N.abs().sum(),
            "weight": weight_N.sum(),
            "entropy": logprobs.entropy.detach().sum(),
            "drift": drift_N.sum(),
            "tis_capped": (correction_N >= self.loss.tis_cap).sum(),
            "decile_tokens": by_decile(batch.place, mask_N),
            "gap_deciles": by_decile(batch.place, gap_N.abs()),
            "weight_deciles": by_decile(batch.place, weight_N),
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
