"""Prefix sums of each packed response's gaps, over context-parallel shards, by one all-gather.

Every segment is zigzag-cut into K = 2R chunks over R context ranks; a rank holds its chunks `rank`
and `2R-1-rank`, equally long. Ranks exchange a few sums per chunk, whatever the length. fp64.
Shapes: T tokens of this rank, S segments, C = 2S local chunks, K chunks of a segment in order.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, overload

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class Prefix:
    """Sums of the masked-in gaps of each token's segment, fp64 `[T]`.

    `total` and `prior_share` are of absolute gaps, and `total` leaves out the last one.
    """

    prior_share: torch.Tensor  # sum of earlier gaps / total; 0 where total is 0
    total: torch.Tensor
    last_gap: torch.Tensor
    index: torch.Tensor  # masked-in tokens of the segment before this one
    length: torch.Tensor  # masked-in tokens of the segment


@dataclass(frozen=True)
class SignedPrefix(Prefix):
    """The sums of `Prefix`, and the running sum of signed gaps, fp64 `[T]`."""

    signed: torch.Tensor  # sum of earlier signed gaps
    low: torch.Tensor  # least `signed` of the segment's masked-in tokens
    high: torch.Tensor  # greatest


@overload
def prefix_sums(
    gap_T: torch.Tensor,
    segment_T: torch.Tensor,
    mask_T: torch.Tensor,
    segments: int,
    cp_group: dist.ProcessGroup | None,
    *,
    with_signed: Literal[False],
) -> Prefix: ...


@overload
def prefix_sums(
    gap_T: torch.Tensor,
    segment_T: torch.Tensor,
    mask_T: torch.Tensor,
    segments: int,
    cp_group: dist.ProcessGroup | None,
    *,
    with_signed: Literal[True],
) -> SignedPrefix: ...


def prefix_sums(
    gap_T: torch.Tensor,
    segment_T: torch.Tensor,
    mask_T: torch.Tensor,
    segments: int,
    cp_group: dist.ProcessGroup | None,
    *,
    with_signed: bool,
) -> Prefix:
    """Return each token's sums, by one all-gather of 6 * S doubles a rank, 12 * S with signed ones.

    gap: `[T]` signed; segment: `[T]` int64 in [0, segments), not decreasing; mask: `[T]` bool.
    """
    ranks, rank = (cp_group.size(), cp_group.rank()) if cp_group is not None else (1, 0)
    chunk_T, start_S, tokens_S = _chunks(segment_T, segments)
    gap_T = gap_T.double().where(mask_T, 0)
    distance_T = gap_T.abs()
    position_T = torch.arange(len(segment_T), device=gap_T.device)
    last_C = position_T.new_full((2 * segments,), -1)  # each chunk's last masked-in token
    last_C.scatter_reduce_(0, chunk_T, position_T.where(mask_T, -1), "amax")
    is_last_T = mask_T & (last_C[chunk_T] == position_T)
    stats = distance_T.new_zeros(3, 2 * segments)  # sum before the last, the last signed, count
    stats[0].index_add_(0, chunk_T, distance_T.where(~is_last_T, 0))
    stats[1].index_add_(0, chunk_T, gap_T.where(is_last_T, 0))
    stats[2].index_add_(0, chunk_T, mask_T.double())
    if with_signed:
        earlier_gap_T = gap_T.where(~is_last_T, 0)
        inside_T = _signed_inside(earlier_gap_T, stats[0], chunk_T, start_S, tokens_S)
        stats = torch.cat([stats, _signed_stats(earlier_gap_T, inside_T, mask_T, chunk_T, stats)])
    stats_FKS = _gather_in_order(stats.view(len(stats), 2, segments), cp_group, ranks)
    before_KS, last_KS, count_KS = stats_FKS[:3]

    # A segment's last gap never enters an exclusive share and may be huge: keep it out of all sums.
    length_S = count_KS.sum(0)
    chunks = torch.arange(2 * ranks, device=gap_T.device)[:, None]
    final_S = torch.where(count_KS > 0, chunks, -1).amax(0)
    is_final_KS = chunks == final_S
    sum_KS = before_KS + last_KS.abs().where(~is_final_KS, 0)
    total_S, last_S = sum_KS.sum(0), last_KS.abs().where(is_final_KS, 0).sum(0)

    own = slice(rank, 2 * ranks - rank, 2 * ranks - 1 - 2 * rank)  # rank and 2R-1-rank
    is_segment_last_T = is_last_T & is_final_KS[own].flatten()[chunk_T]
    # Shares sum to 1 in every segment, so one running sum over the pack is exact next to huge gaps.
    unit_S = total_S.where(total_S != 0, 1.0)
    share_T = distance_T.where(~is_segment_last_T, 0) / unit_S[segment_T]
    prior_share_C = ((sum_KS.cumsum(0) - sum_KS)[own] / unit_S).flatten()
    prior_T = _running(share_T, chunk_T, start_S, tokens_S) + prior_share_C[chunk_T]
    before_C = (count_KS.cumsum(0) - count_KS)[own].flatten()
    index_T = _running(mask_T.double(), chunk_T, start_S, tokens_S) + before_C[chunk_T]
    sums = prior_T.clamp(0, 1), total_S[segment_T], last_S[segment_T], index_T, length_S[segment_T]
    if not with_signed:
        return Prefix(*sums)
    signed_KS, low_KS, high_KS = stats_FKS[3:]
    signed_KS = signed_KS + last_KS.where(~is_final_KS, 0)
    earlier_KS = signed_KS.cumsum(0) - signed_KS
    signed_T = earlier_KS[own].flatten()[chunk_T] + inside_T
    low_S, high_S = (earlier_KS + low_KS).amin(0), (earlier_KS + high_KS).amax(0)
    return SignedPrefix(*sums, signed_T, low_S[segment_T], high_S[segment_T])


def _chunks(segment_T, segments: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return each token's local chunk, and each segment's first token and number of tokens.

    Local chunk (half, segment) is number half * S + segment; both halves are equally long.
    """
    tokens_S = segment_T.new_zeros(segments).index_add_(0, segment_T, torch.ones_like(segment_T))
    start_S = tokens_S.cumsum(0) - tokens_S
    position_T = torch.arange(len(segment_T), device=segment_T.device)
    half_T = (position_T - start_S[segment_T]) >= (tokens_S // 2)[segment_T]
    return half_T * segments + segment_T, start_S, tokens_S


def _signed_inside(gap_T, sum_C, chunk_T, start_S, tokens_S) -> torch.Tensor:
    """Return the exclusive running sum of signed gaps, restarted at every chunk."""
    # In units of the chunk's own sum: one running sum over the pack is then exact for all.
    unit_T = sum_C.where(sum_C > 0, 1.0)[chunk_T]
    return _running(gap_T / unit_T, chunk_T, start_S, tokens_S) * unit_T


def _signed_stats(gap_T, inside_T, mask_T, chunk_T, stats_FC) -> torch.Tensor:
    """Return, `[3, C]`, sum of signed gaps before the last, least and greatest running sum."""
    signed = torch.zeros_like(stats_FC)
    signed[1], signed[2] = math.inf, -math.inf
    signed[0].index_add_(0, chunk_T, gap_T)
    signed[1].scatter_reduce_(0, chunk_T, inside_T.where(mask_T, math.inf), "amin")
    signed[2].scatter_reduce_(0, chunk_T, inside_T.where(mask_T, -math.inf), "amax")
    return signed


def _running(value_T, chunk_T, start_S, tokens_S) -> torch.Tensor:
    """Return the exclusive running sum, restarted at every chunk."""
    before_T = value_T.cumsum(0) - value_T
    first_C = torch.cat([start_S, start_S + tokens_S // 2]).clamp(max=max(len(value_T) - 1, 0))
    return before_T - before_T[first_C][chunk_T] if len(value_T) else before_T


def _gather_in_order(stats_F2S: torch.Tensor, cp_group, ranks: int) -> torch.Tensor:
    """Return `[F, 2R, S]` in token order, first halves up, second down, of all `[F, 2, S]`."""
    if ranks == 1:
        return stats_F2S
    gathered = stats_F2S.new_empty(ranks, *stats_F2S.shape)
    dist.all_gather_into_tensor(
        gathered.view(ranks * stats_F2S.shape[0], -1), stats_F2S.flatten(1), group=cp_group
    )
    return torch.cat([gathered[:, :, 0], gathered[:, :, 1].flip(0)]).transpose(0, 1)
