"""Inverse frequencies of rotary positions, as transformers has them: plain and scaled.

d head size, p position: the angle of pair i at p is p * inverse_frequencies[i].
"""

from __future__ import annotations

import math

import torch

from iwopd_megatron.hf.rope import Rope


def inverse_frequencies(rope: Rope, head_dim: int, on: torch.device) -> torch.Tensor:
    """Return `[d / 2]` fp32: theta^(-2 i / d), scaled by the kind of `rope`.

    Where only a part of each head is turned, d is that part.
    """
    head_dim = int(head_dim * rope.partial_rotary_factor)
    pairs = torch.arange(0, head_dim, 2, dtype=torch.float32, device=on)
    plain = rope.theta ** (-pairs / head_dim)
    if rope.kind == "linear":
        return plain / rope.factor
    if rope.kind == "llama3":
        return _llama3(plain, rope)
    if rope.kind == "yarn":
        return _yarn(plain, rope, head_dim)
    return plain


def turn(angle: torch.Tensor, rope: Rope, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Return cosine and sine of `angle`, times YaRN's attention factor, in `dtype`."""
    cos, sin = angle.cos(), angle.sin()
    if rope.attention_factor != 1:
        cos, sin = cos * rope.attention_factor, sin * rope.attention_factor
    return cos.to(dtype), sin.to(dtype)


def _llama3(plain: torch.Tensor, rope: Rope) -> torch.Tensor:
    """Stretch long waves by the factor, keep short ones and blend those between."""
    wavelength = 2 * math.pi / plain
    rotations = rope.original_positions / wavelength  # within the original context
    span = rope.high_freq_factor - rope.low_freq_factor
    kept = ((rotations - rope.low_freq_factor) / span).clamp(0, 1)
    return (1 - kept) * plain / rope.factor + kept * plain


def _yarn(plain: torch.Tensor, rope: Rope, head_dim: int) -> torch.Tensor:
    """Blend stretched and kept by a ramp between beta_fast and beta_slow rotations (YaRN).

    arXiv 2309.00071.
    """
    low, high = (_pair_with(n, rope, head_dim) for n in (rope.beta_fast, rope.beta_slow))
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    pairs = torch.arange(head_dim // 2, dtype=torch.float32, device=plain.device)
    stretched = ((pairs - low) / (high - low if high != low else 0.001)).clamp(0, 1)
    return plain / rope.factor * stretched + plain * (1 - stretched)


def _pair_with(rotations: float, rope: Rope, head_dim: int) -> float:
    """Return the (fractional) pair that turns `rotations` times within the original context."""
    turns = rope.original_positions / (rotations * 2 * math.pi)
    return head_dim * math.log(turns) / (2 * math.log(rope.theta))
