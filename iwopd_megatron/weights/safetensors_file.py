"""Sharded safetensors written at planned positions: headers first, then raw bytes in any order."""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch

from iwopd_megatron.files.rawfile import OutputFile, raw
from iwopd_megatron.weights.hf_reader import SHARD_BYTES
from iwopd_megatron.weights.manifest import DTYPES


class SafetensorsWriter:
    """Plan every tensor with `add`, then `open`, `write` rows of them in any order, `finish`."""

    def __init__(self) -> None:
        self.shards: list[dict[str, tuple[tuple[int, ...], str]]] = [{}]
        self.copies: dict[str, str] = {}
        self.nbytes = 0
        self._size = 0  # of the last shard
        self._places: dict[str, tuple[OutputFile, int, int]] = {}  # file, position, bytes of a row

    def add(self, name: str, shape: tuple[int, ...], dtype: str) -> None:
        """Plan a tensor; `dtype` as safetensors names it. A shard has SHARD_BYTES or one tensor."""
        size = math.prod(shape) * DTYPES[dtype].itemsize
        if self._size and self._size + size > SHARD_BYTES:
            self.shards.append({})
            self._size = 0
        self.shards[-1][name] = (shape, dtype)
        self._size += size
        self.nbytes += size

    def add_copy(self, copy: str, name: str) -> None:
        """Plan a tensor that is written whenever `name` is."""
        shape, dtype = next(shard[name] for shard in self.shards if name in shard)
        self.copies[copy] = name
        self.add(copy, shape, dtype)

    def open(self, folder: Path) -> None:
        """Create the files at their full size, with headers, and the index if there are several."""
        self.folder, count = folder, len(self.shards)
        names = [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
        names = names if count > 1 else ["model.safetensors"]
        self._files = []
        for title, shard in zip(names, self.shards, strict=True):
            header, size = _header(shard)
            file = OutputFile(folder / title, size)
            file.write(header, 0)
            self._files.append(file)
            layout = json.loads(header[8:])
            for name, (shape, _) in shard.items():
                start, stop = layout[name]["data_offsets"]
                row = (stop - start) // max(1, shape[0])
                self._places[name] = (file, len(header) + start, row)
        if count > 1:
            pairs = zip(names, self.shards, strict=True)
            weight_map = {name: file for file, shard in pairs for name in shard}
            index = {"metadata": {"total_size": self.nbytes}, "weight_map": weight_map}
            (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))

    def write(self, name: str, rows: torch.Tensor, first: int) -> None:
        """Write a tensor's rows from row `first` on. Any thread."""
        copies = [copy for copy, original in self.copies.items() if original == name]
        for target in (name, *copies):
            file, position, row = self._places[target]
            file.write(raw(rows.contiguous()), position + first * row)

    def read(self, name: str, first: int, last: int) -> torch.Tensor:
        """What the files hold of a tensor's rows `first:last`, as uint8. Any thread."""
        file, position, row = self._places[name]
        return file.read(position + first * row, (last - first) * row)

    def finish(self) -> None:
        for file in self._files:
            file.close()


def _header(shard: dict[str, tuple[tuple[int, ...], str]]) -> tuple[bytes, int]:
    """(length and JSON, padded to 8 bytes, and the whole file's size); wide dtypes come first."""
    layout: dict = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (shape, dtype) in sorted(shard.items(), key=lambda x: -DTYPES[x[1][1]].itemsize):
        start, end = end, end + math.prod(shape) * DTYPES[dtype].itemsize
        layout[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(layout, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    header = len(text).to_bytes(8, "little") + text
    return header, len(header) + end
