"""Megatron `torch_dist` checkpoints without a model or a process group, one chunk at a time.

A checkpoint holds global tensors by name, each as chunks (offset, size) in `__*.distcp` files;
`.metadata` says where. Layers are stacked on the first dim, a layer's experts on the second; layers
unlike each other are not, as in Megatron (TransformerBlock.sharded_state_dict).
Chunks may be cut anywhere, so one written here is one piece (pieces.py). torch's writer begins its
files anew; here an interrupted conversion finds each chunk in its planned place.

`native` names are checked against Megatron's own load and save in every layout. `te` names differ
in the norms; TransformerEngine does not run on a CPU: bench/gpu_checkpoint.py checks them on a GPU.
"""

from __future__ import annotations

import json
import math
import pickle
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from iwopd_megatron.files.rawfile import OutputFile, raw
from iwopd_megatron.hf.config import HfConfig
from iwopd_megatron.hf.shapes import hf_shape
from iwopd_megatron.weights.table import WeightBlock, weight_blocks
from iwopd_megatron.weights.torch_dist.blob import envelope, serialise
from iwopd_megatron.weights.torch_dist.torch_internals import (
    ALIGN,
    METADATA_VERSION,
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageInfo,
    TensorProperties,
    TensorStorageMetadata,
)

FILE_BYTES = 5 * 10**9
# How Megatron is asked to cut optimiser states and name things: what any layout can load.
METADATA = {
    "distrib_optim_sharding_type": "fully_reshardable",
    "singleton_local_shards": False,
    "chained_optim_avoid_prefix": True,
}
# metadata.json as Megatron-Core 0.16 writes it (dist_checkpointing/core.py, CheckpointingConfig);
# 0.19 writes the first two, and reads all
CONFIG = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}


@dataclass(frozen=True)
class Slot:
    """Where the data of one chunk goes in the files."""

    file: str
    start: int
    nbytes: int


def block_shape(block: WeightBlock, hf: HfConfig) -> tuple[int, ...]:
    """Return the shape of one layer's, one expert's part: its sources' rows together."""
    shapes = [hf_shape(name, hf) for name in block.hf_names]
    return (sum(shape[0] for shape in shapes), *shapes[0][1:])


def stacked_shape(block: WeightBlock, hf: HfConfig) -> tuple[int, ...]:
    """Return the global tensor's shape: [layers, experts, *block], [layers, *block] or *block."""
    return block.stack + block_shape(block, hf)


@dataclass
class Contents:
    """What some files of a checkpoint hold, and where."""

    tensors: dict[str, TensorStorageMetadata] = field(default_factory=dict)
    objects: dict[str, BytesStorageMetadata] = field(default_factory=dict)
    places: dict[MetadataIndex, StorageInfo] = field(default_factory=dict)

    def add(self, other: Contents) -> None:
        """Take in what other files hold; of one tensor, other chunks."""
        for key, tensor in other.tensors.items():
            if key in self.tensors:
                self.tensors[key].chunks.extend(tensor.chunks)
            else:
                self.tensors[key] = replace(tensor, chunks=list(tensor.chunks))
        self.objects |= other.objects
        self.places |= other.places


class CheckpointPlan:
    """The chunks and objects that one rank writes, each with its place in its files."""

    def __init__(self, rank: int = 0) -> None:
        self.rank, self.contents = rank, Contents()
        self.sizes: list[int] = [0]  # bytes planned for each file
        self.edges: list[tuple[str, int, bytes]] = []  # file, position, what is around the data
        self._empty: StorageInfo | None = None

    def add(
        self,
        key: str,
        whole: tuple[int, ...],
        dtype: torch.dtype,
        offsets: tuple[int, ...],
        sizes: tuple[int, ...],
    ) -> Slot:
        """Plan the chunk `tensor[offsets : offsets + sizes]` of the global tensor `key`."""
        tensors = self.contents.tensors
        if key not in tensors:
            properties = TensorProperties(dtype=dtype)
            tensors[key] = TensorStorageMetadata(properties, torch.Size(whole), [])
        chunk = ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))
        tensors[key].chunks.append(chunk)
        nbytes = math.prod(sizes) * dtype.itemsize
        edge = envelope(sizes, dtype)
        place = self._place(edge.length(nbytes))
        self.contents.places[MetadataIndex(key, chunk.offsets)] = place
        slot = Slot(place.relative_path, place.offset + len(edge.before), nbytes)
        self.edges.append((slot.file, place.offset, edge.before))
        self.edges.append((slot.file, slot.start + nbytes, edge.after))
        return slot

    def add_object(self, key: str, thing: object) -> None:
        """Plan an object, as torch.save writes it; empty ones (None) are one blob in the file."""
        if thing is not None:
            place = self._add_blob(thing)
        else:
            place = self._empty = self._empty or self._add_blob(None)
        self.contents.places[MetadataIndex(key)] = place
        self.contents.objects[key] = BytesStorageMetadata()

    def _add_blob(self, thing: object) -> StorageInfo:
        blob = serialise([thing])
        place = self._place(len(blob))
        self.edges.append((place.relative_path, place.offset, blob))
        return place

    def _place(self, length: int) -> StorageInfo:
        if self.sizes[-1] and self.sizes[-1] + length > FILE_BYTES:
            self.sizes.append(0)
        start = -(-self.sizes[-1] // ALIGN) * ALIGN
        self.sizes[-1] = start + length
        return StorageInfo(self.file_names[-1], start, length)

    @property
    def file_names(self) -> list[str]:
        """The names of the files, as torch names those of a rank."""
        return [f"__{self.rank}_{i}.distcp" for i in range(len(self.sizes))]

    @property
    def nbytes(self) -> int:
        """Bytes of all files."""
        return sum(self.sizes)


class CheckpointWriter:
    """The files of a plan, open at their full size: chunks are written in any order."""

    def __init__(self, plan: CheckpointPlan, folder: Path):
        """Create the files, or go on with those that an interrupted run left."""
        self._folder = folder
        self._files = {
            name: OutputFile(folder / name, size)
            for name, size in zip(plan.file_names, plan.sizes, strict=True)
        }
        for file, position, edge in plan.edges:
            self._files[file].write(edge, position)

    def write(self, slot: Slot, tensor: torch.Tensor) -> None:
        """Write one planned chunk's data, `slot.nbytes` long. Any thread."""
        assert tensor.nbytes == slot.nbytes
        self._files[slot.file].write(raw(tensor.contiguous()), slot.start)

    def read(self, slot: Slot) -> torch.Tensor:
        """Read back what the file holds of a chunk's data, as uint8. Any thread."""
        return self._files[slot.file].read(slot.start, slot.nbytes)

    def close(self) -> list[Path]:
        """Close the files, which need not be on disk yet; return their paths."""
        for file in self._files.values():
            file.close()
        return [self._folder / name for name in self._files]


def write_metadata(folder: Path, contents: Iterable[Contents], common: bytes) -> None:
    """Write `.metadata` of every rank's files, `common.pt` and, last, `metadata.json`.

    `common` is a serialised dict with, under "content_metadata", what Megatron calls a checkpoint's
    content metadata (METADATA).
    """
    whole = Contents()
    for part in contents:
        whole.add(part)
    metadata = Metadata(
        {**whole.tensors, **whole.objects}, storage_data=whole.places, version=METADATA_VERSION
    )
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    (folder / "common.pt").write_bytes(common)
    (folder / "metadata.json").write_text(json.dumps(CONFIG))


def find_names(keys: Collection[str]) -> str:
    """Return whose module names global tensors have, `native` or `te`."""
    return "te" if any(key.endswith(".layer_norm_weight") for key in keys) else "native"


def expected_tensors(hf: HfConfig, names: str) -> dict[str, tuple[int, ...]]:
    """Return global name -> shape of every weight that config.json implies."""
    return {block.key: stacked_shape(block, hf) for block in weight_blocks(hf, names)}
