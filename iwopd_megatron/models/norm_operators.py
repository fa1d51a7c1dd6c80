"""torch's fused RMS norm as operators of our own, `torch.ops.iwopd`: run on a GPU, known without.

On a CPU torch takes its own one apart into many operations before anything can see it. Shapes: x
and its gradients `[..., D]`, weight `[D]`, scale `[..., 1]` fp32 (1 / sqrt(mean(x^2) + eps)).
"""

from __future__ import annotations

import torch

from iwopd_megatron.runtime import device

aten = torch.ops.aten
torch.library.define("iwopd::rms_norm", "(Tensor x, Tensor weight, float eps) -> (Tensor, Tensor)")
torch.library.define(
    "iwopd::rms_norm_backward",
    "(Tensor dout, Tensor x, Tensor scale, Tensor weight) -> (Tensor, Tensor)",
)


@torch.library.impl("iwopd::rms_norm", device.GPU)
def _norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    return aten._fused_rms_norm(x, (x.shape[-1],), weight, eps)


@torch.library.register_fake("iwopd::rms_norm")
def _(x: torch.Tensor, weight: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty_like(x), x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)


@torch.library.impl("iwopd::rms_norm_backward", device.GPU)
def _backward(
    dout: torch.Tensor, x: torch.Tensor, scale: torch.Tensor, weight: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    shape = (x.shape[-1],)
    dx, dweight = aten._fused_rms_norm_backward(dout, x, shape, scale, weight, [True, True])
    return dx, dweight


@torch.library.register_fake("iwopd::rms_norm_backward")
def _(
    dout: torch.Tensor, x: torch.Tensor, scale: torch.Tensor, weight: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty_like(x), torch.empty_like(weight)


class FusedRmsNorm(torch.autograd.Function):
    """x * scale * weight, which keeps x and scale."""

    @staticmethod
    def forward(ctx, x, weight, eps):
        out, scale = torch.ops.iwopd.rms_norm(x, weight, eps)
        ctx.save_for_backward(x, scale, weight)
        return out

    @staticmethod
    def backward(ctx, dout):
        x, scale, weight = ctx.saved_tensors
        dx, dweight = torch.ops.iwopd.rms_norm_backward(dout, x, scale, weight)
        return dx, dweight, None
