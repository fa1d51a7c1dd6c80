"""Products of few rows with large weights: each weight packed once, then read once a step.

MKL's product of a handful of rows rearranges the weight on every call, which reads and writes it
again; four rows on one core then get half of what memory gives. Packed beforehand in MKL's own
order, a weight is read front to back. The copies are as large as the weights: they are made of the
weights of that moment, and live while one batch is decoded.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from iwopd_megatron.rollout.decoder_weights import DecoderWeights, Layer

MOST_ROWS = 32  # with more, rearranging is a small part of a product
LEAST_BYTES = 64 * 2**20  # of a model; a smaller one may stay in the cache
LEAST_STEPS = 8  # packing takes as long as about three steps


class Packed(NamedTuple):
    """A weight `[O, I]` with its copy for products of `rows` rows."""

    weight_OI: torch.Tensor
    copy: torch.Tensor
    rows: int

    def product(self, x: torch.Tensor) -> torch.Tensor:
        """Return x weight^T, `[..., O]`, of x `[..., I]` with `rows` rows."""
        return torch.ops.mkl._mkl_linear(x, self.copy, self.weight_OI, None, self.rows)


class PackedLayer(NamedTuple):
    """A layer's packed weights; experts are not packed: each has other rows every step."""

    qkv: Packed
    out: Packed
    gate_up: Packed | None
    down: Packed | None


class PackedWeights(NamedTuple):
    """A model's packed weights."""

    layers: list[PackedLayer]
    head: Packed


def pack(weights: DecoderWeights, rows: int, steps: int) -> PackedWeights | None:
    """Return copies for `steps` products of `rows` rows each; None where they would not pay.

    They do for large fp32 weights on a CPU whose torch has MKL.
    """
    head = weights.head
    has_mkl = torch.backends.mkl.is_available()
    if head.device.type != "cpu" or head.dtype != torch.float32 or not has_mkl:
        return None
    if rows > MOST_ROWS or steps < LEAST_STEPS or _nbytes(weights) < LEAST_BYTES:
        return None

    def packed(weight_OI: torch.Tensor) -> Packed:
        copy = torch.ops.mkl._mkl_reorder_linear_weight(weight_OI.contiguous(), rows)
        return Packed(weight_OI, copy, rows)

    def packed_layer(layer: Layer) -> PackedLayer:
        attention = packed(layer.qkv), packed(layer.out)
        if layer.router is not None:
            return PackedLayer(*attention, None, None)
        return PackedLayer(*attention, packed(layer.gate_up[0].t()), packed(layer.down[0].t()))

    return PackedWeights([packed_layer(layer) for layer in weights.layers], packed(head))


def _nbytes(weights: DecoderWeights) -> int:
    """Return the bytes that packing copies."""
    total = weights.head.nbytes
    for layer in weights.layers:
        total += layer.qkv.nbytes + layer.out.nbytes
        if layer.router is None:
            total += layer.gate_up.nbytes + layer.down.nbytes
    return total
