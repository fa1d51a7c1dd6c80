"""A block of a checkpoint cut into pieces of bounded size, each with the rows it is made of.

Rows of a stack are its sources' rows, one after the other: nothing is copied. Queries, keys and
values are interleaved by key-value group, so there a piece is the block of a model with fewer
groups, and goes through the weight table's own cut.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch

from iwopd_megatron.hf.config import HfConfig
from iwopd_megatron.hf.shapes import hf_shape
from iwopd_megatron.weights.sharding import Source
from iwopd_megatron.weights.table import WeightBlock

PIECE_BYTES = 32 * 2**20  # of one piece, and so of what one worker holds


@dataclass(frozen=True)
class Piece:
    """Rows `first:last` of a block, and the row ranges of the sources they are made of."""

    first: int
    last: int
    sources: dict[str, tuple[int, int]]  # Hugging Face name -> first row, end
    hf: HfConfig  # the config of a model with only this piece's heads

    def gather(
        self, block: WeightBlock, tensors: Mapping[str, Source]
    ) -> tuple[list[torch.Tensor], torch.Tensor]:
        """Return (the sources' rows, the block's rows) from Hugging Face tensors or slices."""
        rows = [tensors[name][a:b] for name, (a, b) in self.sources.items()]
        is_stack = block.sharding.is_stack
        return rows, rows[0] if is_stack else block.sharding.shard(rows, 0, 1, self.hf)

    def scatter(self, block: WeightBlock, rows: torch.Tensor) -> list[torch.Tensor]:
        """Return the sources' rows from the block's."""
        return [rows] if block.sharding.is_stack else block.sharding.unshard([rows], self.hf)


def cut_block(block: WeightBlock, hf: HfConfig, itemsize: int) -> Iterator[Piece]:
    """Cut a block by rows, or by key-value groups where its sources are interleaved.

    A piece has PIECE_BYTES at most, or one row or group; `itemsize` is the dtype's bytes.
    """
    shapes = {name: hf_shape(name, hf) for name in block.hf_names}
    if block.sharding.is_stack:
        base = 0
        for name, shape in shapes.items():
            per_row = itemsize * math.prod(shape[1:])
            step = max(1, PIECE_BYTES // per_row)
            for a in range(0, shape[0], step):
                b = min(a + step, shape[0])
                yield Piece(base + a, base + b, {name: (a, b)}, hf)
            base += shape[0]
        return
    groups = hf.num_key_value_heads
    rows = {name: shape[0] // groups for name, shape in shapes.items()}
    width = math.prod(next(iter(shapes.values()))[1:])
    group_bytes = sum(rows.values()) * width * itemsize
    step = max(1, PIECE_BYTES // group_bytes)
    for a in range(0, groups, step):
        b = min(a + step, groups)
        sources = {name: (a * n, b * n) for name, n in rows.items()}
        height = sum(rows.values())
        yield Piece(a * height, b * height, sources, replace(hf, num_key_value_heads=b - a))
