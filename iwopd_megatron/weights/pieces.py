"""A block of a checkpoint cut into pieces of bounded size, each with the rows it is made of.

Rows of a stack are its sources' rows, one after the other: nothing is copied. Queries, keys and
values are interleaved by key-value group, so there a piece is the block of a model with fewer
groups, and goes through the weight table's own cut.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from iwopd_megatron.hf.config import HfConfig
from iwopd_megatron.hf.shapes import hf_shape
from iwopd_megatron.weights.table import Block

LIMIT = 32 * 2**20  # bytes of one piece, and so of what one worker holds


@dataclass(frozen=True)
class Piece:
    """Rows `first:last` of a block, and the row ranges of the sources they are made of."""

    first: int
    last: int
    sources: dict[str, tuple[int, int]]
    hf: HfConfig  # the config of a model with only this piece's heads

    def gather(self, block: Block, tensors: Any) -> tuple[list[torch.Tensor], torch.Tensor]:
        """(the sources' rows, the block's rows) from whole Hugging Face tensors or slices."""
        rows = [tensors[name][a:b] for name, (a, b) in self.sources.items()]
        return rows, rows[0] if block.cut.is_stack else block.cut.shard(rows, 0, 1, self.hf)

    def scatter(self, block: Block, rows: torch.Tensor) -> list[torch.Tensor]:
        """The sources' rows from the block's."""
        return [rows] if block.cut.is_stack else block.cut.unshard([rows], self.hf)


def cut(block: Block, hf: HfConfig, itemsize: int) -> Iterator[Piece]:
    """Cut a block by rows, or by key-value groups where its sources are interleaved."""
    shapes = {name: hf_shape(name, hf) for name in block.hf_names}
    if block.cut.is_stack:
        base = 0
        for name, shape in shapes.items():
            per_row = itemsize * (shape[1] if len(shape) > 1 else 1)
            step = max(1, LIMIT // per_row)
            for a in range(0, shape[0], step):
                b = min(a + step, shape[0])
                yield Piece(base + a, base + b, {name: (a, b)}, hf)
            base += shape[0]
        return
    groups = hf.num_key_value_heads
    rows = {name: shape[0] // groups for name, shape in shapes.items()}
    group_bytes = sum(rows.values()) * hf.hidden_size * itemsize
    step = max(1, LIMIT // group_bytes)
    for a in range(0, groups, step):
        b = min(a + step, groups)
        sources = {name: (a * n, b * n) for name, n in rows.items()}
        height = sum(rows.values())
        yield Piece(a * height, b * height, sources, replace(hf, num_key_value_heads=b - a))
