"""Triton kernels of `tile_ops`: one program a row, which reads it once.

Arithmetic is fp32 whatever the tile's dtype; the statistics are the online softmax's (Milakov and
Gimelshein, arXiv 1805.02867) with one more sum for the entropy.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

BLOCK, WARPS = 4096, 8


@triton.jit
def _statistics(tile, max_out, sum_out, weighted_out, columns, scale, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    line = tile + row * columns
    peak, total, weighted = -1e30, 0.0, 0.0  # weighted by logits relative to the peak
    for start in range(0, columns, BLOCK):
        column = start + tl.arange(0, BLOCK)
        is_inside = column < columns
        x = tl.load(line + column, mask=is_inside, other=float("-inf")).to(tl.float32) * scale
        new_peak = tl.maximum(peak, tl.max(x, 0))
        shift = peak - new_peak
        rescale = tl.exp(shift)
        e = tl.exp(x - new_peak)
        weighted = (weighted + shift * total) * rescale
        weighted += tl.sum(tl.where(is_inside, e * (x - new_peak), 0.0), 0)
        total = total * rescale + tl.sum(e, 0)
        peak = new_peak
    tl.store(max_out + row, peak)
    tl.store(sum_out + row, total)
    tl.store(weighted_out + row, weighted + peak * total)


def statistics(
    tile_CU: torch.Tensor, inv_temperature: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return maxima, sums of exp(logit - max), of that * logit, fp32 `[C]`; logits scale * tile."""
    rows, columns = tile_CU.shape
    out = torch.empty(3, rows, device=tile_CU.device)
    _statistics[(rows,)](
        tile_CU.contiguous(), *out, columns, inv_temperature, BLOCK=BLOCK, num_warps=WARPS
    )
    return out[0], out[1], out[2]


@triton.jit
def _gradient(
    tile,
    ids,
    dids,
    logz,
    dentropy,
    mean_logit,
    columns,
    count,
    scale,
    HAS_ENTROPY: tl.constexpr,
    IDS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    line = tile + row * columns
    k = tl.arange(0, IDS)
    id = tl.load(ids + row * count + k, mask=k < count, other=-1)
    dlogp = tl.load(dids + row * count + k, mask=k < count, other=0.0)
    is_here = (id >= 0) & (id < columns)
    chosen = tl.load(line + id, mask=is_here, other=0.0).to(tl.float32) * scale
    # an id that is scored twice has both gradients
    own = tl.sum(tl.where(id[:, None] == id[None, :], dlogp[None, :], 0.0), 1)
    z, dlogz = tl.load(logz + row), tl.sum(dlogp, 0)
    if HAS_ENTROPY:
        d, mean = tl.load(dentropy + row), tl.load(mean_logit + row)
    tl.debug_barrier()  # all have read before any writes
    for start in range(0, columns, BLOCK):
        column = start + tl.arange(0, BLOCK)
        is_inside = column < columns
        x = tl.load(line + column, mask=is_inside, other=0.0).to(tl.float32) * scale
        upstream = dlogz
        if HAS_ENTROPY:
            upstream = dlogz + d * (x - mean)
        tl.store(line + column, -tl.exp(x - z) * upstream * scale, mask=is_inside)
    tl.debug_barrier()  # the chosen ones come last: a sum in the tile's dtype would lose digits
    upstream = dlogz
    if HAS_ENTROPY:
        upstream = dlogz + d * (chosen - mean)
    tl.store(line + id, (own - tl.exp(chosen - z) * upstream) * scale, mask=is_here)


def gradient_(
    tile_CU: torch.Tensor,
    inv_temperature: float,
    ids_CK: torch.Tensor,
    logz_C: torch.Tensor,
    dids_CK: torch.Tensor,
    dentropy_C: torch.Tensor | None,
    mean_logit_C: torch.Tensor | None,
) -> torch.Tensor:
    """Write `tile_ops.gradient` over the tile and return it; entropy's two tensors, or neither.

    The tile is contiguous.
    """
    (rows, columns), count = tile_CU.shape, ids_CK.shape[1]
    assert tile_CU.is_contiguous()
    has_entropy = dentropy_C is not None
    upstream = logz_C if dentropy_C is None else dentropy_C
    mean_logit = logz_C if mean_logit_C is None else mean_logit_C
    _gradient[(rows,)](
        tile_CU,
        ids_CK.contiguous(),
        dids_CK.contiguous(),
        logz_C.contiguous(),
        upstream.contiguous(),
        mean_logit.contiguous(),
        columns,
        count,
        inv_temperature,
        HAS_ENTROPY=has_entropy,
        IDS=max(2, triton.next_power_of_2(count)),
        BLOCK=BLOCK,
        num_warps=WARPS,
    )
    return tile_CU
