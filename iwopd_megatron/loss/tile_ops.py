"""What the LM head does with a tile of logits: its statistics in one read, its gradient in place.

On a GPU the matrix products are so fast that every further pass over the logits shows; there both
are one Triton kernel each (tile_kernels.py), known to torch as operators (tile_operators.py). On
CPUs they are torch's operations.
Shapes: C tokens and U vocabulary entries of a tile, K scored ids.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from iwopd_megatron.loss import tile_operators  # noqa: F401  (torch.ops.iwopd)
from iwopd_megatron.runtime import device


class Statistics(NamedTuple):
    """Statistics of a tile's rows, fp32 `[C]`."""

    max: torch.Tensor
    sum: torch.Tensor  # of exp(logit - max)
    weighted: torch.Tensor | None  # of exp(logit - max) * logit


class EntropyGradient(NamedTuple):
    """Upstream gradient of the rows' entropies, and their mean logits, fp32 `[C]`."""

    upstream: torch.Tensor
    mean_logit: torch.Tensor


def is_fused(tile: torch.Tensor) -> bool:
    """Return whether the kernels are used for tensors where this one is."""
    return tile.is_cuda or device.is_rehearsed()


def scaled(tile_CU: torch.Tensor, inv_temperature: float) -> torch.Tensor:
    """Return the logits, fp32; at temperature 1 of an fp32 tile the tile itself."""
    logits_CU = tile_CU.float()
    return logits_CU * inv_temperature if inv_temperature != 1 else logits_CU


def statistics(tile_CU: torch.Tensor, inv_temperature: float, with_entropy: bool) -> Statistics:
    """Return a tile's statistics; its contents, products of hidden states and head, may be lost."""
    if is_fused(tile_CU):
        return Statistics(*torch.ops.iwopd.tile_statistics(tile_CU, inv_temperature))
    logits_CU = scaled(tile_CU, inv_temperature)
    max_C = logits_CU.amax(-1)
    if not with_entropy:
        return Statistics(max_C, logits_CU.sub_(max_C[:, None]).exp_().sum(-1), None)
    exp_CU = (logits_CU - max_C[:, None]).exp_()
    return Statistics(max_C, exp_CU.sum(-1), torch.linalg.vecdot(exp_CU, logits_CU))


def gradient(
    tile_CU: torch.Tensor,
    inv_temperature: float,
    ids_CK: torch.Tensor,
    logz_C: torch.Tensor,
    dids_CK: torch.Tensor,
    entropy: EntropyGradient | None,
) -> torch.Tensor:
    """Return the gradient of sum(dids * log-prob of ids) by the products, in the tile's dtype.

    The tile's memory is used for it. ids: columns of the tile, outside [0, U) where they are not in
    it; logz: logsumexp of the whole row.
    """
    if is_fused(tile_CU):
        torch.ops.iwopd.tile_gradient_(
            tile_CU, inv_temperature, ids_CK, logz_C, dids_CK, *(entropy or (None, None))
        )
        return tile_CU
    logits_CU = scaled(tile_CU, inv_temperature)
    dlogz_C1 = dids_CK.sum(1, keepdim=True)  # every scored log-prob subtracts the normaliser once
    if entropy is None:
        dlogits_CU = logits_CU.sub_(logz_C[:, None]).exp_().mul_(-dlogz_C1)
    else:
        prob_CU = (logits_CU - logz_C[:, None]).exp_()
        scale_CU = logits_CU.sub_(entropy.mean_logit[:, None]).mul_(entropy.upstream[:, None])
        dlogits_CU = prob_CU.mul_(scale_CU.add_(dlogz_C1)).neg_()
    place_CK, is_here_CK = places(ids_CK, tile_CU.shape[1])
    dlogits_CU.scatter_add_(1, place_CK, dids_CK.where(is_here_CK, 0))
    if inv_temperature != 1:
        dlogits_CU.mul_(inv_temperature)
    return dlogits_CU.to(tile_CU.dtype)


def places(ids_CK: torch.Tensor, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return columns of these ids in a tile, 0 where they lie outside it; and which lie inside."""
    is_here_CK = (ids_CK >= 0) & (ids_CK < columns)
    return ids_CK.where(is_here_CK, 0), is_here_CK


def found(tile_CU: torch.Tensor, inv_temperature: float, ids_CK: torch.Tensor) -> torch.Tensor:
    """Return logits of these ids, fp32 `[C, K]`, 0 where they lie outside the tile."""
    place_CK, is_here_CK = places(ids_CK, tile_CU.shape[1])
    return (tile_CU.gather(1, place_CK).float() * inv_temperature).where(is_here_CK, 0)
