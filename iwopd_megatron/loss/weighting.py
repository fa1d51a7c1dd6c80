"""Token weights of IW-OPD, on padded batches and on packed tokens cut over context-parallel ranks.

With the gap d_t = teacher_logp_t - old_logp_t of a response's T loss tokens,
F_t = sum_{k<t} |d_k| / D, where D = sum_{k<T} |d_k| ("exclusive", Eq. 16, so F_T = 1) or
D = sum_{k<=T} |d_k| + 1e-8 ("inclusive", the authors' code); F = 0 if D = 0;
S_t = sum_{k<t} d_k; N_t = (S_t - min S) / (max S - min S), 1 if S is constant; and Z_t the mean of
exp(alpha * S_t) over the optimiser step's responses that reach t:

    uniform       1                                                           Eq. 4-6
    iw            1 + gamma * (1 - F_t)                                       Eq. 17
    surrogate     1 - F_t                                                     Eq. 16
    iw_signed     1 + gamma * N_t                                             Eq. 14, 16
    log_ratio     N_t; alpha cancels                                          Eq. 14, 16
    ratio         exp(alpha * S_t) / Z_t                                      Eq. 11, 44-46
    ratio_blend   1 + gamma * exp(alpha * S_t) / Z_t                          Table 4
    linear        1 + gamma * (1 - (t-1) / (T-1)); 1 + gamma if T = 1         Table 4
    prefix_boost  1 + gamma on the first ceil(share * T) tokens, 1 after      Table 4
    prefix        1 on the first ceil(share * T) tokens, 0 elsewhere          Fig. 1a
    suffix        1 on the last ceil(share * T) tokens, 0 elsewhere           Fig. 1a
    schedule      prefix, its share going from `start` to `end` in training   Table 4

Sums run in fp64 (prefix.py). Shapes: B batch, T tokens, S segments, R context ranks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist

from iwopd_megatron.loss.prefix import Prefix, prefix_sums

DENOMINATORS = ("exclusive", "inclusive")
ANNEALS = ("cosine", "linear")
RATIO_RULES = ("ratio", "ratio_blend")  # need Z_t
SIGNED_RULES = ("iw_signed", "log_ratio", *RATIO_RULES)  # need S_t
MAX_LOG_RATIO = 80.0  # alpha * S_t is clamped to +-80 before exp, in ratios and in their mean


def token_weights(
    gap: torch.Tensor,
    mask: torch.Tensor,
    *,
    rule: str = "iw",
    gamma: float = 0.5,
    alpha: float = 0.01,
    share: float = 0.3,
    denominator: str = "exclusive",
    step: int | None = None,
    total_steps: int | None = None,
    start: float = 0.3,
    end: float = 1.0,
    anneal: str = "cosine",
) -> torch.Tensor:
    """Weights `[B, T]` fp32 for signed gaps `[B, T]` (nats) and a bool mask; 0 where False.

    The B rows are all the responses of the step: ratio rules take their Z_t from them. ValueError
    names the first row with a gap that is not finite, e.g. from a teacher log-prob of -inf.
    """
    wrong = (mask & ~gap.isfinite()).nonzero()
    if len(wrong):
        row, column = wrong[0].tolist()
        raise ValueError(
            f"sample {row}: the gap of token {column} is {gap[row, column].item()}; "
            "teacher and student log-probs must be finite."
        )
    segment_ids = torch.arange(gap.shape[0], device=gap.device)[:, None].expand(gap.shape)
    mean = None
    if rule in RATIO_RULES:
        mean = ratio_mean([g[m] for g, m in zip(gap, mask, strict=True)], alpha).to(gap.device)
    weights = token_weights_packed(
        gap.flatten(), segment_ids.flatten(), mask.flatten(), num_segments=gap.shape[0],
        rule=rule, gamma=gamma, alpha=alpha, share=share, denominator=denominator, step=step,
        total_steps=total_steps, start=start, end=end, anneal=anneal, ratio_mean=mean,
    )  # fmt: skip
    return weights.view(gap.shape)


def token_weights_packed(
    gap: torch.Tensor,
    segment_ids: torch.Tensor,
    mask: torch.Tensor,
    *,
    num_segments: int | None = None,
    cp_group: dist.ProcessGroup | None = None,
    rule: str = "iw",
    gamma: float = 0.5,
    alpha: float = 0.01,
    share: float = 0.3,
    denominator: str = "exclusive",
    step: int | None = None,
    total_steps: int | None = None,
    start: float = 0.3,
    end: float = 1.0,
    anneal: str = "cosine",
    ratio_mean: torch.Tensor | None = None,
) -> torch.Tensor:
    """Weights `[T]` fp32 of this rank's packed tokens; 0 where the mask is False.

    gap: `[T]` signed, nats; segment_ids: `[T]` int64, not decreasing, the same segments on every
    rank; mask: `[T]` bool; ratio_mean: `[longest response]` fp64, Z_t of the whole optimiser step;
    step: optimiser steps done, of total_steps. With `cp_group` of R ranks every segment is
    zigzag-cut: this rank holds its chunks `rank` and `2R-1-rank`, equally long
    (parallel.zigzag_index). A segment may also lie on one rank alone; then pass `num_segments`,
    the same on every rank. Whatever the length, one all-gather of 6 * S doubles a rank, or of
    12 * S for a rule with S_t; none for uniform. A gap that is not finite makes weights NaN, and
    with them the loss: nothing here waits for the device to look for one (`gates` does, by name).
    """
    if rule not in RULES:
        raise ValueError(f"unknown weighting rule '{rule}'; use one of {', '.join(RULES)}.")
    if denominator not in DENOMINATORS:
        raise ValueError(f"unknown denominator '{denominator}'; use exclusive or inclusive.")
    if rule in RATIO_RULES and ratio_mean is None:
        raise ValueError(
            f"rule '{rule}' on packed tokens needs ratio_mean=; "
            "compute it with ratio_mean(gaps, alpha) from all responses of the optimiser step."
        )
    if rule == "schedule":
        share = scheduled_share(step, total_steps, start, end, anneal)
    if rule == "uniform":
        return mask.float()
    if num_segments is None:
        num_segments = int(segment_ids.max()) + 1 if len(segment_ids) else 0
    signed = rule in SIGNED_RULES
    place = prefix_sums(gap, segment_ids, mask, num_segments, cp_group, signed)
    settings = _Settings(gamma, alpha, share, denominator, ratio_mean)
    return torch.where(mask, _RULES[rule](place, settings), 0).float()


def ratio_mean(gaps: Sequence[Sequence[float]], alpha: float) -> torch.Tensor:
    """Z_t `[longest response]` fp64 from the gaps of all the step's responses (Eq. 45).

    The mean of exp(alpha * S_t) over the responses that reach t. Z_1 = 1 even without responses.
    """
    longest = max([1, *map(len, gaps)])
    total = torch.zeros(longest, dtype=torch.float64)
    count = torch.zeros(longest, dtype=torch.float64)
    for gap in gaps:
        gap_T = torch.as_tensor(gap, dtype=torch.float64, device="cpu")
        prior_T = torch.cat([gap_T.new_zeros(1), gap_T.cumsum(0)])[: len(gap_T)]
        total[: len(gap_T)] += _exp(alpha * prior_T)
        count[: len(gap_T)] += 1
    return torch.where(count > 0, total / count, 1.0)


def scheduled_share(
    step: int | None, total_steps: int | None, start: float, end: float, anneal: str
) -> float:
    """The prefix share after `step` of `total_steps`: `start` at 0, `end` from total_steps on."""
    if step is None or not total_steps:
        raise ValueError("rule 'schedule' needs step= and total_steps=, the progress of training.")
    if anneal not in ANNEALS:
        raise ValueError(f"unknown anneal '{anneal}'; use cosine or linear.")
    done = min(max(step / total_steps, 0.0), 1.0)
    if anneal == "cosine":
        done = (1 - math.cos(math.pi * done)) / 2
    return start + (end - start) * done


def _exp(log_ratio: torch.Tensor) -> torch.Tensor:
    return log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()


class _Settings(NamedTuple):
    gamma: float
    alpha: float
    share: float
    denominator: str
    ratio_mean: torch.Tensor | None


def _prior_share(place: Prefix, s: _Settings) -> torch.Tensor:  # F_t
    total = place.total
    if s.denominator == "inclusive":
        total = place.total + place.last_gap + 1e-8
    return torch.where(place.total == 0, 0.0, place.prior_share * (place.total / total))


def _rescaled(place: Prefix, s: _Settings) -> torch.Tensor:  # N_t
    rescaled = (place.signed - place.low) / (place.high - place.low)
    return torch.where(place.total == 0, 1.0, rescaled)  # no gap before the last: S is constant


def _ratio(place: Prefix, s: _Settings) -> torch.Tensor:  # Eq. 46
    t = place.index.clamp(max=place.length - 1).clamp(min=0).long()  # masked-out: any position
    return _exp(s.alpha * place.signed) / s.ratio_mean[t]


def _kept(place: Prefix, s: _Settings) -> torch.Tensor:
    return (s.share * place.length - 1e-9).ceil()  # 30 % of 10 tokens is 3, also in floating point


def _is_first(place: Prefix, s: _Settings) -> torch.Tensor:
    return place.index < _kept(place, s)


_RULES: dict[str, Callable[[Prefix, _Settings], torch.Tensor]] = {
    "iw": lambda place, s: 1 + s.gamma * (1 - _prior_share(place, s)),  # Eq. 17
    "surrogate": lambda place, s: 1 - _prior_share(place, s),  # Eq. 16
    "iw_signed": lambda place, s: 1 + s.gamma * _rescaled(place, s),  # Eq. 14, 16
    "log_ratio": _rescaled,  # Eq. 14, 16
    "ratio": _ratio,  # Eq. 46
    "ratio_blend": lambda place, s: 1 + s.gamma * _ratio(place, s),
    "linear": lambda place, s: 1 + s.gamma * (1 - place.index / (place.length - 1).clamp(min=1)),
    "prefix_boost": lambda place, s: 1 + s.gamma * _is_first(place, s),
    "prefix": _is_first,
    "suffix": lambda place, s: place.index >= place.length - _kept(place, s),
    "schedule": _is_first,
}
RULES = ("uniform", *_RULES)
