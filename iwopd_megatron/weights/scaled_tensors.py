"""Scaled FP8 weights as lazy slices that come out multiplied: W = Q * S, block by block.

The product is taken in fp32 and rounded once to the dtype asked for, as transformers does
(finegrained_fp8.py, 5.23.0); compressed-tensors rounds it to the scale's dtype first (0.20.1).
"""

from __future__ import annotations

import torch

from iwopd_megatron.weights.manifest import DTYPE_NAMES
from iwopd_megatron.weights.sharding import TensorSlice


class ScaledSlice:
    """A TensorSlice of a matrix `[rows, columns]`; what is indexed is read and multiplied.

    `quantised` is a lazy slice of FP8 values, `scale` `[ceil(rows / block[0]), ceil(columns /
    block[1])]` floats (or one), each for one block.
    """

    def __init__(
        self,
        quantised: TensorSlice,
        scale: torch.Tensor,
        block: tuple[int, int],
        dtype: torch.dtype,
        rounds_product: bool,
    ):
        self.quantised, self.block, self.dtype = quantised, block, dtype
        self.product_dtype = scale.dtype if rounds_product else torch.float32
        rows, columns = quantised.get_shape()
        self.scale = scale.float().view(-(-rows // block[0]), -(-columns // block[1]))

    def get_shape(self) -> list[int]:
        """Return [rows, columns]."""
        return self.quantised.get_shape()

    def get_dtype(self) -> str:
        """Return the dtype that indexing gives, as safetensors names it."""
        return DTYPE_NAMES[self.dtype]

    def __getitem__(self, index: slice | tuple[slice, ...], /) -> torch.Tensor:
        """Return W at the index in the dtype asked for."""
        index = index if isinstance(index, tuple) else (index,)
        places = [
            torch.arange(size)[part] // block
            for size, part, block in zip(
                self.get_shape(), (*index, slice(None))[:2], self.block, strict=True
            )
        ]
        scale = self.scale[places[0]][:, places[1]]
        product = self.quantised[index].float().mul_(scale)
        return product.to(self.product_dtype).to(self.dtype)
