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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import get_args

import torch
import torch.distributed as dist

from iwopd_megatron.config.loss import RuleName, WeightingRule
from iwopd_megatron.loss.prefix import Prefix, SignedPrefix, prefix_sums

RULES: tuple[str, ...] = get_args(RuleName)
DENOMINATORS = ("exclusive", "inclusive")
ANNEALS = ("cosine", "linear")
MAX_LOG_RATIO = 80.0  # alpha * S_t is clamped to +-80 before exp, in ratios and in their mean


def token_weights(
    gap: torch.Tensor,
    mask: torch.Tensor,
    *,
    rule: str | WeightingRule = "iw",
    step: int | None = None,
    total_steps: int | None = None,
    **settings: float | str,
) -> torch.Tensor:
    """Return weights `[B, T]` fp32 for signed gaps `[B, T]` (nats) and a bool mask; 0 where False.

    settings: fields of `WeightingRule`, e.g. `gamma=0.5`. The B rows are all the responses of the
    step: ratio rules take Z_t from them. Raises ValueError at a gap that is not finite.
    """
    wrong = (mask & ~gap.isfinite()).nonzero()
    if len(wrong):
        row, column = wrong[0].tolist()
        raise ValueError(
            f"sample {row}: the gap of token {column} is {gap[row, column].item()}; "
            "teacher and student log-probs must be finite."
        )
    chosen = _rule_of(rule, settings)
    mean = None
    if chosen.rule in RATIO_RULES:
        mean = ratio_mean([g[m] for g, m in zip(gap, mask, strict=True)], chosen.alpha)
        mean = mean.to(gap.device)
    segment_ids = torch.arange(gap.shape[0], device=gap.device)[:, None].expand(gap.shape)
    weights = StepWeighting(chosen, step, total_steps, mean).packed(
        gap.flatten(), segment_ids.flatten(), mask.flatten(), num_segments=gap.shape[0]
    )
    return weights.view(gap.shape)


def token_weights_packed(
    gap: torch.Tensor,
    segment_ids: torch.Tensor,
    mask: torch.Tensor,
    *,
    num_segments: int | None = None,
    cp_group: dist.ProcessGroup | None = None,
    rule: str | WeightingRule = "iw",
    step: int | None = None,
    total_steps: int | None = None,
    ratio_mean: torch.Tensor | None = None,
    **settings: float | str,
) -> torch.Tensor:
    """Return weights `[T]` fp32 of this rank's packed tokens; see `StepWeighting.packed`.

    settings: fields of `WeightingRule`, e.g. `gamma=0.5`.
    """
    weighting = StepWeighting(_rule_of(rule, settings), step, total_steps, ratio_mean)
    return weighting.packed(gap, segment_ids, mask, num_segments=num_segments, cp_group=cp_group)


@dataclass(frozen=True)
class StepWeighting:
    """A rule and what it reads of the optimiser step beside the tokens.

    step: optimiser steps done, of total_steps (schedule); ratio_mean: Z_t of the whole step,
    `[longest response]` fp64 (ratio rules).
    """

    rule: WeightingRule
    step: int | None = None
    total_steps: int | None = None
    ratio_mean: torch.Tensor | None = None

    def packed(
        self,
        gap: torch.Tensor,
        segment_ids: torch.Tensor,
        mask: torch.Tensor,
        *,
        num_segments: int | None = None,
        cp_group: dist.ProcessGroup | None = None,
    ) -> torch.Tensor:
        """Return weights `[T]` fp32 of this rank's packed tokens; 0 where the mask is False.

        gap: `[T]` signed, nats; segment_ids: `[T]` int64, not decreasing, the same segments on
        every rank; mask: `[T]` bool. With `cp_group` of R ranks every segment is zigzag-cut: this
        rank holds its chunks `rank` and `2R-1-rank`, equally long (parallel.zigzag_index). A
        segment may also lie on one rank alone; then pass `num_segments`, the same on every rank.
        Whatever the length, one all-gather of 6 * S doubles a rank, or of 12 * S for a rule with
        S_t; none for uniform. A gap that is not finite makes weights NaN: nothing here waits for
        the device to look for one. Raises ValueError where the rule lacks what it needs.
        """
        rule, name, total = self.rule, self.rule.rule, self.rule.denominator
        if name not in RULES:
            raise ValueError(f"unknown weighting rule '{name}'; use one of {', '.join(RULES)}.")
        if total not in DENOMINATORS:
            raise ValueError(f"unknown denominator '{total}'; use exclusive or inclusive.")
        if name == "uniform":
            return mask.float()
        if num_segments is None:
            num_segments = int(segment_ids.max()) + 1 if len(segment_ids) else 0
        tokens = gap, segment_ids, mask, num_segments, cp_group
        if name in _BY_RATIO:
            if self.ratio_mean is None:
                raise ValueError(
                    f"rule '{name}' on packed tokens needs ratio_mean=; compute it with "
                    "ratio_mean(gaps, alpha) from all responses of the optimiser step."
                )
            signed = prefix_sums(*tokens, with_signed=True)
            weight_T = _BY_RATIO[name](rule, _ratio(signed, rule.alpha, self.ratio_mean))
        elif name in _BY_SIGNED_SUM:
            signed = prefix_sums(*tokens, with_signed=True)
            weight_T = _BY_SIGNED_SUM[name](rule, _rescaled(signed))
        else:
            if name == "schedule":
                progress = self.step, self.total_steps
                share = scheduled_share(*progress, rule.start, rule.end, rule.anneal)
                rule = rule.model_copy(update={"share": share})
            weight_T = _BY_DISTANCE[name](rule, prefix_sums(*tokens, with_signed=False))
        return torch.where(mask, weight_T, 0).float()


def _rule_of(rule: str | WeightingRule, settings: Mapping[str, float | str]) -> WeightingRule:
    """Return the rule of a function's keywords. Only a recipe's numbers are held to its bounds."""
    for name in settings:
        if name not in WeightingRule.model_fields:
            raise TypeError(f"got an unexpected keyword argument '{name}'")
    if isinstance(rule, WeightingRule):
        return rule.model_copy(update=settings)
    return WeightingRule().model_copy(update={"rule": rule, **settings})


def ratio_mean(gaps: Sequence[Sequence[float] | torch.Tensor], alpha: float) -> torch.Tensor:
    """Return Z_t, `[longest response]` fp64, from the gaps of all the step's responses (Eq. 45).

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
    """Return the prefix share after `step` of `total_steps`: `start` at 0, at last `end`."""
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


# Terms of the rules' formulas, fp64 `[T]`.


def _prior_share(rule: WeightingRule, place: Prefix) -> torch.Tensor:  # F_t
    total = place.total
    if rule.denominator == "inclusive":
        total = place.total + place.last_gap + 1e-8
    return torch.where(place.total == 0, 0.0, place.prior_share * (place.total / total))


def _rescaled(place: SignedPrefix) -> torch.Tensor:  # N_t
    rescaled = (place.signed - place.low) / (place.high - place.low)
    return torch.where(place.total == 0, 1.0, rescaled)  # no gap before the last: S is constant


def _ratio(place: SignedPrefix, alpha: float, ratio_mean: torch.Tensor) -> torch.Tensor:  # Eq. 46
    t = place.index.clamp(max=place.length - 1).clamp(min=0).long()  # masked-out: any position
    return _exp(alpha * place.signed) / ratio_mean[t]


def _kept(rule: WeightingRule, place: Prefix) -> torch.Tensor:
    return (rule.share * place.length - 1e-9).ceil()  # 30 % of 10 is 3, also in floating point


def _is_first(rule: WeightingRule, place: Prefix) -> torch.Tensor:
    return place.index < _kept(rule, place)


_BY_DISTANCE: dict[str, Callable[[WeightingRule, Prefix], torch.Tensor]] = {
    "iw": lambda r, place: 1 + r.gamma * (1 - _prior_share(r, place)),  # Eq. 17
    "surrogate": lambda r, place: 1 - _prior_share(r, place),  # Eq. 16
    "linear": lambda r, place: 1 + r.gamma * (1 - place.index / (place.length - 1).clamp(min=1)),
    "prefix_boost": lambda r, place: 1 + r.gamma * _is_first(r, place),
    "prefix": _is_first,
    "suffix": lambda r, place: place.index >= place.length - _kept(r, place),
    "schedule": _is_first,
}
_BY_SIGNED_SUM: dict[str, Callable[[WeightingRule, torch.Tensor], torch.Tensor]] = {
    "iw_signed": lambda r, rescaled: 1 + r.gamma * rescaled,  # of N_t; Eq. 14, 16
    "log_ratio": lambda r, rescaled: rescaled,
}
_BY_RATIO: dict[str, Callable[[WeightingRule, torch.Tensor], torch.Tensor]] = {
    "ratio": lambda r, ratio: ratio,  # exp(alpha * S_t) / Z_t; Eq. 46
    "ratio_blend": lambda r, ratio: 1 + r.gamma * ratio,
}
RATIO_RULES = tuple(_BY_RATIO)  # need Z_t
