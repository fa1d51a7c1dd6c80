"""Operations of the torch-native modules that autograd would spread over many passes of memory.

Each is one `autograd.Function` with its backward written out, any dtype, CPU or GPU.
Shapes: T tokens, D features, h heads, d head size, E local experts.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from iwopd_megatron.models.norm_operators import FusedRmsNorm
from iwopd_megatron.runtime import device


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Return x / sqrt(mean(x^2) + eps) * weight over the last dim; by torch's kernel on a GPU."""
    if device.has_gpu_kernels():
        return FusedRmsNorm.apply(x, weight, eps)
    return _RmsNorm.apply(x, weight, eps)


def rms_scale(x: torch.Tensor, eps: float) -> torch.Tensor:
    """Return 1 / sqrt(mean(x^2) + eps) over the last dim, kept, fp32, in one pass over x."""
    square = torch.linalg.vector_norm(x.float(), dim=-1, keepdim=True).square_()
    return square.div_(x.shape[-1]).add_(eps).rsqrt_()


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, eps):
        scale = rms_scale(x, eps)
        ctx.save_for_backward(x, scale, weight)
        return (x * scale).to(x.dtype).mul_(weight)

    @staticmethod
    def backward(ctx, dout):
        x, scale, weight = ctx.saved_tensors
        normed = (x * scale).to(x.dtype)
        product = (dout * normed).flatten(0, -2)
        dweight = product.sum(0)
        inner = (product @ weight).view(scale.shape) / -weight.shape[0]
        dx = (dout * weight).addcmul_(normed, inner).mul_(scale)
        return dx, dweight, None


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Return x `[..., h, d]` turned by cos and sin `[..., 1, d / 2]`: rotary, half-split form.

    Of narrower ones, only as much of x as they are for; the rest is kept.
    """
    return _Rotate.apply(x, cos, sin)


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, cos, sin):
        ctx.save_for_backward(cos, sin)
        return _turn(x, cos, sin, 1)

    @staticmethod
    def backward(ctx, dout):
        cos, sin = ctx.saved_tensors
        return _turn(dout, cos, sin, -1), None, None


def _turn(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, direction: int) -> torch.Tensor:
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    turned = 2 * cos.shape[-1]
    if turned < x.shape[-1]:
        out[..., turned:] = x[..., turned:]
    (a, b), (out_a, out_b) = x[..., :turned].chunk(2, -1), out[..., :turned].chunk(2, -1)
    torch.mul(a, cos, out=out_a).addcmul_(b, sin, value=-direction)
    torch.mul(b, cos, out=out_b).addcmul_(a, sin, value=direction)
    return out


def grouped_mm(
    x: torch.Tensor, weight: torch.Tensor, tokens_per_expert: torch.Tensor
) -> torch.Tensor:
    """Return `x[rows of expert e] @ weight[e]`, `[T, out]`.

    x: `[T, in]`, sorted by expert; weight: `[E, in, out]`; tokens_per_expert: `[E]`.
    One kernel where torch has it, elsewhere one matrix product per expert.
    """
    kernel = device.grouped_mm_kernel(x.dtype)
    is_aligned = all(size * x.element_size() % 16 == 0 for size in weight.shape[1:])
    if kernel is not None and is_aligned:
        ends = tokens_per_expert.to(x.device, non_blocking=True).cumsum(0, dtype=torch.int32)
        return kernel(x, weight, offs=ends)
    parts = x.split(tokens_per_expert.tolist())
    return torch.cat([part @ w for part, w in zip(parts, weight.unbind(), strict=True)])


def swiglu(gate_up: torch.Tensor, scale: torch.Tensor | None = None) -> torch.Tensor:
    """Return silu(gate) * up * scale, `[T, D]`.

    gate_up: `[T, 2 D]` with the halves side by side; scale: `[T, 1]`.
    """
    return _SwiGlu.apply(gate_up, scale)


class _SwiGlu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate_up, scale):
        ctx.save_for_backward(gate_up, scale)
        gate, up = gate_up.chunk(2, -1)
        out = F.silu(gate).mul_(up)
        return out if scale is None else out.mul_(scale)

    @staticmethod
    def backward(ctx, dout):
        gate_up, scale = ctx.saved_tensors
        gate, up = gate_up.chunk(2, -1)
        dgate_up = torch.empty_like(gate_up)
        dgate, dup = dgate_up.chunk(2, -1)
        activated, dscale = F.silu(gate), None
        if scale is not None:
            dscale = torch.linalg.vecdot(dout * activated, up)[..., None].to(scale.dtype)
            dout = dout * scale
        torch.mul(dout, activated, out=dup)
        dgate.copy_(torch.ops.aten.silu_backward(dout * up, gate))
        return dgate_up, dscale
