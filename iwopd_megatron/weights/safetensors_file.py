"""Sharded safetensors written at planned positions: headers first, then raw bytes in any order.

safetensors' own writer wants every tensor of a file in memory at once; here several threads write
rows as they come, and an interrupted conversion finds what it had written in its place.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch

from iwopd_megatron.files.rawfile import OutputFile, raw
from iwopd_megatron.hf.headers import BITS
from iwopd_megatron.weights.shards import INDEX, index_content, plan_shards


class PlannedTensor(NamedTuple):
    """A tensor that is to be written; `dtype` as safetensors names it."""

    shape: tuple[int, ...]
    dtype: str

    @property
    def nbytes(self) -> int:
        """Bytes of its data."""
        return math.prod(self.shape) * BITS[self.dtype] // 8


class SafetensorsPlan:
    """The tensors of a folder that is to be written, in order."""

    def __init__(self) -> None:
        self.tensors: dict[str, PlannedTensor] = {}
        self.copies: dict[str, str] = {}  # a tensor that is written whenever another is

    def add(self, name: str, shape: tuple[int, ...], dtype: str) -> None:
        """Plan a tensor; `dtype` as safetensors names it."""
        self.tensors[name] = PlannedTensor(shape, dtype)

    def add_copy(self, copy: str, name: str) -> None:
        """Plan a tensor that is written whenever `name` is."""
        self.copies[copy] = name
        self.tensors[copy] = self.tensors[name]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors' data."""
        return sum(tensor.nbytes for tensor in self.tensors.values())


class _Place(NamedTuple):
    """Where a tensor's data begins, and how many bytes a row of it has."""

    file: OutputFile
    position: int
    row_bytes: int


class SafetensorsWriter:
    """The files of a plan, open at their full size: rows are written in any order, then `close`."""

    def __init__(self, plan: SafetensorsPlan, folder: Path):
        """Create the files with their headers, and the index if there are several."""
        self._copies = plan.copies
        self._files: list[OutputFile] = []
        self._places: dict[str, _Place] = {}
        split = plan_shards({name: tensor.nbytes for name, tensor in plan.tensors.items()})
        for title, names in split.filename_to_tensors.items():
            shard = {name: plan.tensors[name] for name in names}
            header, positions, size = _header(shard)
            file = OutputFile(folder / title, size)
            file.write(header, 0)
            self._files.append(file)
            for name, tensor in shard.items():
                rows = tensor.shape[0] if tensor.shape else 1
                row_bytes = tensor.nbytes // max(1, rows)
                self._places[name] = _Place(file, positions[name], row_bytes)
        if split.is_sharded:
            (folder / INDEX).write_text(json.dumps(index_content(split), indent=2))

    def write(self, name: str, rows: torch.Tensor, first: int) -> None:
        """Write a tensor's rows, or their bytes, from row `first` on. Any thread."""
        copies = [copy for copy, original in self._copies.items() if original == name]
        for target in (name, *copies):
            place = self._places[target]
            place.file.write(raw(rows.contiguous()), place.position + first * place.row_bytes)

    def read(self, name: str, first: int, last: int) -> torch.Tensor:
        """Read back what the files hold of a tensor's rows `first:last`, as uint8. Any thread."""
        place = self._places[name]
        position = place.position + first * place.row_bytes
        return place.file.read(position, (last - first) * place.row_bytes)

    def close(self) -> None:
        """Close the files."""
        for file in self._files:
            file.close()


def _header(shard: Mapping[str, PlannedTensor]) -> tuple[bytes, dict[str, int], int]:
    """Return (length and JSON padded to 8 bytes, each tensor's position, the file's size).

    Wide dtypes come first, as safetensors writes them, so that every tensor is aligned.
    """
    layout: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    starts: dict[str, int] = {}
    end = 0
    for name, tensor in sorted(shard.items(), key=lambda item: -BITS[item[1].dtype]):
        starts[name], end = end, end + tensor.nbytes
        shape, offsets = list(tensor.shape), [starts[name], end]
        layout[name] = {"dtype": tensor.dtype, "shape": shape, "data_offsets": offsets}
    text = json.dumps(layout, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    header = len(text).to_bytes(8, "little") + text
    positions = {name: len(header) + start for name, start in starts.items()}
    return header, positions, len(header) + end
