"""Products of few rows with large weights: each weight packed once, then read once a step.

MKL's product of a handful of rows rearranges the weight on every call, which reads and writes it
again; four rows on one core then get half of what memory gives. Packed beforehand in MKL's own
order, a weight is read front to back. The copies are as large as the weights: they are made of the
weights of that moment, and live while one batch is decoded.

In bf16 (`rollout.bf16_products`) they are half as large, oneDNN's, and multiplied by a CPU's matrix
units: inputs and outputs of a product are rounded to bf16, sums are fp32. The LM head's copy stays
fp32: a logit rounded to bf16 would be off by up to a sixteenth.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from iwopd_megatron.rollout.decoder_weights import DecoderWeights, Layer
from iwopd_megatron.rollout.threads import Threads

MOST_ROWS = 128  # with more, rearranging is a small part of a product
LEAST_BYTES = 64 * 2**20  # of a model; a smaller one may stay in the cache
TILE = 64  # outputs: MKL sums those of a part that ends elsewhere in another order
LEAST_STEPS = 8  # packing takes as long as about that many steps save


class Part(NamedTuple):
    """Some output rows of a weight, `[part of O, I]`, and their copy."""

    weight_OI: torch.Tensor
    copy: torch.Tensor


class Packed(NamedTuple):
    """A weight `[O, I]` with its copy for products of `rows` rows, a part for each thread."""

    parts: list[Part]
    rows: int
    threads: Threads
    in_bf16: bool = False

    def product(self, x: torch.Tensor) -> torch.Tensor:
        """Return x weight^T, fp32 `[B, ..., O]`, of x `[B, ..., I]` with `rows` rows or fewer.

        The same bits with any number of threads: each output is one sum over I.
        """
        given = len(x)
        if given < self.rows:
            x = torch.cat([x, x.new_zeros(self.rows - given, *x.shape[1:])])

        def of(part: Part) -> torch.Tensor:
            return torch.ops.mkl._mkl_linear(x, part.copy, part.weight_OI, None, self.rows)

        def of_bf16(part: Part) -> torch.Tensor:
            product = torch.ops.mkldnn._linear_pointwise
            return product(x.bfloat16(), part.copy, None, "none", [], "").float()

        found = self.threads.over(of_bf16 if self.in_bf16 else of, self.parts)
        return (found[0] if len(found) == 1 else torch.cat(found, -1))[:given]


class PackedLayer(NamedTuple):
    """A layer's packed weights; routed experts are not packed: each has other rows every step."""

    qkv: Packed | None
    out: Packed
    gate_up: Packed | None
    down: Packed | None
    shared_gate_up: Packed | None = None
    shared_down: Packed | None = None


class PackedWeights(NamedTuple):
    """A model's packed weights."""

    layers: list[PackedLayer]
    head: Packed


def has_bf16_products() -> bool:
    """Return whether this CPU multiplies bf16 matrices in a way that torch's oneDNN uses."""
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def pack(
    weights: DecoderWeights, rows: int, steps: int, threads: Threads, in_bf16: bool = False
) -> PackedWeights | None:
    """Return copies for `steps` products of `rows` rows each; None where they would not pay.

    They do for large fp32 weights on a CPU whose torch has MKL. in_bf16: all layers' copies are in
    bf16, however small the model, so that no answer depends on how many are written beside it.
    """
    head = weights.head
    has_mkl = torch.backends.mkl.is_available()
    if head.device.type != "cpu" or head.dtype != torch.float32 or not has_mkl:
        return None
    pays = rows <= MOST_ROWS and steps >= LEAST_STEPS and _nbytes(weights) >= LEAST_BYTES
    if not pays and not in_bf16:
        return None

    def packed(weight_OI: torch.Tensor) -> Packed:
        return pack_weight(weight_OI, rows, threads, in_bf16)

    def packed_layer(layer: Layer) -> PackedLayer:
        qkv = None if layer.qkv is None else packed(layer.qkv)
        attention = qkv, packed(layer.out)
        if layer.shared_gate_up is not None and layer.shared_down is not None:
            shared = packed(layer.shared_gate_up), packed(layer.shared_down)
            return PackedLayer(*attention, None, None, *shared)
        if layer.router is not None:
            return PackedLayer(*attention, None, None)
        return PackedLayer(*attention, packed(layer.gate_up[0].t()), packed(layer.down[0].t()))

    layers = [packed_layer(layer) for layer in weights.layers]
    return PackedWeights(layers, pack_weight(head, rows, threads))


def pack_weight(
    weight_OI: torch.Tensor, rows: int, threads: Threads, in_bf16: bool = False
) -> Packed:
    """Return a weight `[O, I]`, fp32, packed for products of `rows` rows on `threads`."""
    share = -(-len(weight_OI) // (threads.count * TILE)) * TILE

    def of(part_OI: torch.Tensor) -> Part:
        copy = torch.ops.mkl._mkl_reorder_linear_weight(part_OI.contiguous(), rows)
        return Part(part_OI, copy)

    def of_bf16(part_OI: torch.Tensor) -> Part:
        rounded = part_OI.to(torch.bfloat16, memory_format=torch.contiguous_format)
        return Part(part_OI, torch.ops.mkldnn._reorder_linear_weight(rounded, rows))

    parts = threads.over(of_bf16 if in_bf16 else of, weight_OI.split(share))
    return Packed(parts, rows, threads, in_bf16)


def _nbytes(weights: DecoderWeights) -> int:
    """Return the bytes that packing copies."""
    total = weights.head.nbytes
    for layer in weights.layers:
        total += layer.out.nbytes + (0 if layer.qkv is None else layer.qkv.nbytes)
        if layer.router is None:
            total += layer.gate_up.nbytes + layer.down.nbytes
        for shared in (layer.shared_gate_up, layer.shared_down):
            total += 0 if shared is None else shared.nbytes
    return total
