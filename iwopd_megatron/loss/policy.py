"""Advantage and policy loss of on-policy distillation: pure functions, global denominators.

A_t = teacher_logp_t - old_logp_t (Eq. 6), times w_t;  eta_t = exp(logp_t - old_logp_t);
loss = sum_t c_t * -min(eta_t A_t, clip(eta_t, 1 - eps, 1 + eps) A_t) / denominator_t   (Eq. 67)
with c_t = min(exp(old_logp_t - rollout_logp_t), cap), truncated importance weight trainer / engine.
Dual clip (the authors' code): where A_t < 0 the term in front of c_t is at most -dual_clip * A_t.
"""

from __future__ import annotations

import math

import torch

AGGREGATIONS = ("token_mean", "seq_mean_token_mean", "seq_mean_token_sum")


def opd_advantage(
    teacher_logp: torch.Tensor,
    old_logp: torch.Tensor,
    *,
    base_logp: torch.Tensor | None = None,
    extrapolation: float = 1.0,
) -> torch.Tensor:
    """Return the advantage per token (nats, no gradient), same shape as its inputs (Eq. 6).

    base_logp: reward extrapolation, lambda * (teacher - base) - (old - base); lambda = 1 is OPD.
    ValueError where `extrapolation` is not 1 and there is no base_logp.
    """
    if base_logp is None:
        if extrapolation != 1.0:
            raise ValueError(
                f"extrapolation={extrapolation} needs base_logp, the base student's log-probs."
            )
        return (teacher_logp - old_logp).detach()
    return (extrapolation * (teacher_logp - base_logp) - (old_logp - base_logp)).detach()


def policy_loss(
    logp: torch.Tensor,
    old_logp: torch.Tensor,
    advantage: torch.Tensor,
    mask: torch.Tensor,
    *,
    clip: float = 0.2,
    dual_clip: float | None = None,
    rollout_logp: torch.Tensor | None = None,
    tis_cap: float | None = 5.0,
    denominator: float | torch.Tensor,
) -> torch.Tensor:
    """Return this rank's masked-in sum of the clipped objective / `denominator`, a scalar (Eq. 67).

    All tensors fp32 of one shape; `denominator` is the global count, or one per token
    (`token_denominator`), so that sums over micro-batches and ranks give the mean over the whole
    optimiser step. Without `rollout_logp` or `tis_cap` there is no importance weight. Log-ratios
    are clamped to +-20 before exp.
    """
    ratio = (logp - old_logp).clamp(-20, 20).exp()
    objective = torch.minimum(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage)
    if dual_clip is not None:
        bounded = torch.maximum(objective, dual_clip * advantage)
        objective = torch.where(advantage < 0, bounded, objective)
    if rollout_logp is not None and tis_cap is not None:
        objective = objective * importance_weight(old_logp, rollout_logp, tis_cap)
    return -(objective / denominator).where(mask, 0).sum()


def is_clipped(
    logp: torch.Tensor, old_logp: torch.Tensor, advantage: torch.Tensor, clip: float
) -> torch.Tensor:
    """Return, bool per token, whether the PPO clip holds its gradient back."""
    log_ratio = (logp - old_logp).detach()
    too_far_up = (log_ratio > math.log1p(clip)) & (advantage > 0)
    too_far_down = (log_ratio < math.log1p(-min(clip, 1 - 1e-6))) & (advantage < 0)
    return too_far_up | too_far_down


def importance_weight(
    old_logp: torch.Tensor, rollout_logp: torch.Tensor, cap: float
) -> torch.Tensor:
    """Return the importance weight min(exp(old - rollout), cap) per token, no gradient."""
    return (old_logp - rollout_logp).detach().clamp(-20, 20).exp().clamp(max=cap)


def token_denominator(aggregation: str, length: int, responses: int, tokens: int) -> float:
    """Return what one token's loss is divided by.

    length: loss tokens in its response; responses, tokens: in the whole optimiser step (all ranks).
    seq_mean_token_mean, the mean over responses of token means, is what the authors' script has.
    """
    return {
        "token_mean": tokens,
        "seq_mean_token_mean": length * responses,
        "seq_mean_token_sum": responses,
    }[aggregation]
