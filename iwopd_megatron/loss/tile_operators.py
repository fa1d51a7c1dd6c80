"""The LM head's kernels as operators of torch, `torch.ops.iwopd`: run on a GPU, known without one.

What they return, and what they write to, is stated beside each, so that a model on tensors without
memory goes through the same lines as one on a GPU. Shapes: C tokens and U entries of a tile, K ids.
"""

from __future__ import annotations

import torch

from iwopd_megatron.runtime import device

KINDS = (device.GPU, device.CPU)  # the latter by Triton's interpreter

torch.library.define("iwopd::tile_statistics", "(Tensor tile, float scale) -> Tensor[]")
torch.library.define(
    "iwopd::tile_gradient_",
    "(Tensor(a!) tile, float scale, Tensor ids, Tensor logz, Tensor dids, Tensor? dentropy, "
    "Tensor? mean_logit) -> ()",
)
torch.library.define("iwopd::add_product_", "(Tensor(a!) total, Tensor a, Tensor b) -> ()")


@torch.library.impl("iwopd::tile_statistics", KINDS)
def _statistics(tile_CU: torch.Tensor, scale: float) -> list[torch.Tensor]:
    from iwopd_megatron.loss import tile_kernels  # imports Triton

    return list(tile_kernels.statistics(tile_CU, scale))


@torch.library.register_fake("iwopd::tile_statistics")
def _(tile_CU: torch.Tensor, scale: float) -> list[torch.Tensor]:
    return list(tile_CU.new_empty(3, len(tile_CU), dtype=torch.float32).unbind())


@torch.library.impl("iwopd::tile_gradient_", KINDS)
def _gradient(tile_CU, scale, ids_CK, logz_C, dids_CK, dentropy_C, mean_logit_C) -> None:
    from iwopd_megatron.loss import tile_kernels

    tile_kernels.gradient_(tile_CU, scale, ids_CK, logz_C, dids_CK, dentropy_C, mean_logit_C)


@torch.library.register_fake("iwopd::tile_gradient_")
def _(tile_CU, scale, ids_CK, logz_C, dids_CK, dentropy_C, mean_logit_C) -> None:
    return None


@torch.library.impl("iwopd::add_product_", KINDS)
def _add_product(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    if total.is_cuda:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total += a @ b


@torch.library.register_fake("iwopd::add_product_")
def _(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    return None
