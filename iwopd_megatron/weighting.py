"""Token weights of IW-OPD, on padded batches and on packed tokens cut over context-parallel ranks.

iw:  w_t = 1 + gamma * (1 - F_t),  F_t = sum_{k<t} d_k / D   (Eq. 16, 17)
with d_t = |teacher_logp_t - old_logp_t| and D = sum_{k<T} d_k ("exclusive", Eq. 16, so w_T = 1)
or D = sum_{k<=T} d_k + 1e-8 ("inclusive", the authors' code). Only masked-in tokens count.
Sums run in fp64. Shapes: B batch, T tokens, S segments, R context ranks.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist

RULES = ("uniform", "iw", "prefix", "suffix")
DENOMINATORS = ("exclusive", "inclusive")


def token_weights(
    gap: torch.Tensor,
    mask: torch.Tensor,
    *,
    rule: str = "iw",
    gamma: float = 0.5,
    share: float = 0.3,
    denominator: str = "exclusive",
) -> torch.Tensor:
    """Weights `[B, T]` fp32 for signed gaps `[B, T]` (nats) and a bool mask; 0 where False."""
    segment_ids = torch.arange(gap.shape[0], device=gap.device)[:, None].expand(gap.shape)
    weights = token_weights_packed(
        gap.flatten(), segment_ids.flatten(), mask.flatten(), num_segments=gap.shape[0],
        rule=rule, gamma=gamma, share=share, denominator=denominator,
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
    share: float = 0.3,
    denominator: str = "exclusive",
) -> torch.Tensor:
    """Weights `[T]` fp32 of this rank's packed tokens; 0 where the mask is False.

    gap: `[T]` signed, nats; segment_ids: `[T]` int64, not decreasing, the same segments on every
    rank; mask: `[T]` bool. With `cp_group` of R ranks every segment is zigzag-cut: this rank holds
    its chunks `rank` and `2R-1-rank`, equally long (parallel.zigzag_index). Whatever the length,
    one all-gather of 6 * S doubles a rank.
    """
    if rule not in RULES:
        raise ValueError(f"unknown weighting rule '{rule}'; use one of {', '.join(RULES)}.")
    if denominator not in DENOMINATORS:
        raise ValueError(f"unknown denominator '{denominator}'; use exclusive or inclusive.")
    if rule == "uniform":
        return mask.float()
    if num_segments is None:
        num_segments = int(segment_ids.max()) + 1 if len(segment_ids) else 0
    place = _prefix(gap, segment_ids, mask, num_segments, cp_group)
    if rule == "iw":
        total = place.total
        if denominator == "inclusive":
            total = place.total + place.last_gap + 1e-8
        prior_share = (place.prior_share * (place.total / total)).nan_to_num(0.0)
        weights = 1 + gamma * (1 - prior_share)  # Eq. 17
    else:
        kept = (
            share * place.length - 1e-9
        ).ceil()  # 30 % of 10 tokens is 3, also in floating point
        first = place.index < kept
        weights = first if rule == "prefix" else place.index >= place.length - kept
    return torch.where(mask, weights, 0).float()


class _Prefix(NamedTuple):
    """Per token, fp64 `[T]`; `total` leaves out the segment's last masked-in gap."""

    prior_share: torch.Tensor  # sum of earlier gaps / total; 0 where total is 0
    total: torch.Tensor
    last_gap: torch.Tensor
    index: torch.Tensor  # masked-in tokens of the segment before this one
    length: torch.Tensor  # masked-in tokens of the segment


def _prefix(
    gap_T: torch.Tensor,
    segment_T: torch.Tensor,
    mask_T: torch.Tensor,
    segments: int,
    cp_group: dist.ProcessGroup | None,
) -> _Prefix:
    ranks, rank = (cp_group.size(), cp_group.rank()) if cp_group is not None else (1, 0)
    # Local chunk (half, segment) is number half * S + segment; both halves are equally long.
    tokens_S = segment_T.new_zeros(segments).index_add_(0, segment_T, torch.ones_like(segment_T))
    start_S = tokens_S.cumsum(0) - tokens_S
    position_T = torch.arange(len(segment_T), device=gap_T.device)
    half_T = (position_T - start_S[segment_T]) >= (tokens_S // 2)[segment_T]
    chunk_T = half_T * segments + segment_T

    distance_T = gap_T.double().abs().where(mask_T, 0)
    last_C = position_T.new_full((2 * segments,), -1)  # each chunk's last masked-in token
    last_C.scatter_reduce_(0, chunk_T, position_T.where(mask_T, -1), "amax")
    is_last_T = mask_T & (last_C[chunk_T] == position_T)
    stats = distance_T.new_zeros(3, 2 * segments)  # sum before the last, the last, count
    stats[0].index_add_(0, chunk_T, distance_T.where(~is_last_T, 0))
    stats[1].index_add_(0, chunk_T, distance_T.where(is_last_T, 0))
    stats[2].index_add_(0, chunk_T, mask_T.double())
    before_KS, last_KS, count_KS = _gather_in_order(stats.view(3, 2, segments), cp_group, ranks)

    # A segment's last gap never enters an exclusive share and may be huge: keep it out of all sums.
    length_S = count_KS.sum(0)
    chunks = torch.arange(2 * ranks, device=gap_T.device)[:, None]
    final_S = torch.where(count_KS > 0, chunks, -1).amax(0)
    is_final_KS = chunks == final_S
    sum_KS = before_KS + last_KS.where(~is_final_KS, 0)
    total_S, last_S = sum_KS.sum(0), last_KS.where(is_final_KS, 0).sum(0)

    own = slice(rank, 2 * ranks - rank, 2 * ranks - 1 - 2 * rank)  # rank and 2R-1-rank
    is_segment_last_T = is_last_T & is_final_KS[own].flatten()[chunk_T]
    # Shares sum to 1 in every segment, so one running sum over the pack is exact next to huge gaps.
    share_T = (distance_T.where(~is_segment_last_T, 0) / total_S[segment_T]).nan_to_num(
        0.0, 0.0, 0.0
    )
    prior_sum_C = (sum_KS.cumsum(0) - sum_KS)[own] / total_S
    prior_T = (
        _running(share_T, chunk_T, start_S, tokens_S)
        + prior_sum_C.nan_to_num(0.0).flatten()[chunk_T]
    )
    before_C = (count_KS.cumsum(0) - count_KS)[own].flatten()
    index_T = _running(mask_T.double(), chunk_T, start_S, tokens_S) + before_C[chunk_T]
    return _Prefix(
        prior_T.clamp(0, 1), total_S[segment_T], last_S[segment_T], index_T, length_S[segment_T]
    )


def _running(value_T, chunk_T, start_S, tokens_S) -> torch.Tensor:
    """Exclusive running sum, restarted at every chunk."""
    before_T = value_T.cumsum(0) - value_T
    first_C = torch.cat([start_S, start_S + tokens_S // 2]).clamp(max=max(len(value_T) - 1, 0))
    return before_T - before_T[first_C][chunk_T] if len(value_T) else before_T


def _gather_in_order(stats_F2S: torch.Tensor, cp_group, ranks: int) -> torch.Tensor:
    """`[F, 2, S]` of every rank -> `[F, 2R, S]` in token order: first halves up, second down."""
    if ranks == 1:
        return stats_F2S
    gathered = stats_F2S.new_empty(ranks, *stats_F2S.shape)
    dist.all_gather_into_tensor(
        gathered.view(ranks * stats_F2S.shape[0], -1), stats_F2S.flatten(1), group=cp_group
    )
    return torch.cat([gathered[:, :, 0], gathered[:, :, 1].flip(0)]).transpose(0, 1)
