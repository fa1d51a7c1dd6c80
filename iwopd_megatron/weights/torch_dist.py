"""Megatron `torch_dist` checkpoints without a model or a process group, one chunk at a time.

A checkpoint holds global tensors by name, each as chunks (offset, size) in `__*.distcp` files;
`.metadata` says where. Layers are stacked on the first dim, a layer's experts on the second.
Chunks may be cut anywhere, so one written here is one piece (pieces.py).

`native` names are checked against Megatron's own load and save in every layout. `te` names differ
in the norms; TransformerEngine does not run on a CPU: bench/gpu_checkpoint.py checks them on a GPU.
"""

from __future__ import annotations

import json
import math
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from iwopd_megatron.files.rawfile import OutputFile, raw
from iwopd_megatron.hf.config import HfConfig
from iwopd_megatron.hf.shapes import hf_shape
from iwopd_megatron.weights.blob import ALIGN, envelope, serialise
from iwopd_megatron.weights.table import Block, blocks

FILE_BYTES = 5 * 10**9
# How Megatron is asked to cut optimiser states and name things: what any layout can load.
METADATA = {
    "distrib_optim_sharding_type": "fully_reshardable",
    "singleton_local_shards": False,
    "chained_optim_avoid_prefix": True,
}
CONFIG = {
    "sharded_backend": "torch_dist", "sharded_backend_version": 1,
    "common_backend": "torch", "common_backend_version": 1,
}  # fmt: skip
# What Megatron stores beside the weights for modules that may keep a state of their own: None.
_STATEFUL = {
    "native": ["self_attention.linear_qkv", "self_attention.linear_proj"],
    "te": [
        "self_attention.linear_qkv", "self_attention.linear_proj", "self_attention.q_layernorm",
        "self_attention.k_layernorm",
    ],
}  # fmt: skip


@dataclass(frozen=True)
class Slot:
    """Where the data of one chunk goes: file name, position, bytes."""

    file: str
    start: int
    nbytes: int


def block_shape(block: Block, hf: HfConfig) -> tuple[int, ...]:
    """Shape of one layer's, one expert's part: its sources' rows together."""
    shapes = [hf_shape(name, hf) for name in block.hf_names]
    return (sum(shape[0] for shape in shapes), *shapes[0][1:])


def stacked_shape(block: Block, hf: HfConfig) -> tuple[int, ...]:
    """The global tensor's shape: [layers, experts, *block], [layers, *block] or the block's."""
    stacked = (hf.num_hidden_layers, hf.num_experts)[: len(block.place)]
    return stacked + block_shape(block, hf)


def object_keys(hf: HfConfig, names: str) -> list[str]:
    """Names of the empty `_extra_state` objects that Megatron's load asks for."""
    layers, experts = hf.num_hidden_layers, hf.num_experts
    modules = list(_STATEFUL[names])
    if not experts:
        modules += ["mlp.linear_fc1", "mlp.linear_fc2"]
    elif names == "te":
        modules.append("pre_mlp_layernorm")  # of a dense layer it is inside mlp.linear_fc1
    keys = [
        f"decoder.layers.{module}._extra_state/shard_{layer}_{layers}"
        for module in modules
        for layer in range(layers)
    ]
    keys += [
        f"decoder.layers.mlp.experts.experts.{fc}._extra_state/shard_{layer}.{e}_{layers}.{experts}"
        for fc in ("linear_fc1", "linear_fc2")
        for layer in range(layers)
        for e in range(experts)
    ]
    return keys + ["decoder.final_layernorm._extra_state/shard_0_1"] * (names == "te")


class Writer:
    """Plan every chunk with `add`, then `open`, `write` them in any order, and `finish`."""

    def __init__(self) -> None:
        self.tensors: dict[str, TensorStorageMetadata] = {}
        self.places: dict[MetadataIndex, _StorageInfo] = {}
        self.ends: list[int] = [0]  # bytes planned for each file
        self.edges: list[tuple[str, int, bytes]] = []

    def add(
        self,
        key: str,
        whole: tuple[int, ...],
        dtype: torch.dtype,
        offsets: tuple[int, ...],
        sizes: tuple[int, ...],
    ) -> Slot:
        """Plan the chunk `tensor[offsets : offsets + sizes]` of the global tensor `key`."""
        if key not in self.tensors:
            properties = TensorProperties(dtype=dtype)
            self.tensors[key] = TensorStorageMetadata(properties, torch.Size(whole), [])
        chunk = ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))
        self.tensors[key].chunks.append(chunk)
        nbytes = math.prod(sizes) * dtype.itemsize
        edge = envelope(sizes, dtype)
        start = self._place(MetadataIndex(key, chunk.offsets), edge.length(nbytes))
        file = self.places[MetadataIndex(key, chunk.offsets)].relative_path
        slot = Slot(file, start + len(edge.before), nbytes)
        self.edges += [(file, start, edge.before), (file, slot.start + nbytes, edge.after)]
        return slot

    def add_objects(self, keys: list[str]) -> None:
        """Plan empty objects; all of them are one blob in the file."""
        blob = serialise([None])
        start = self._place(MetadataIndex(keys[0]), len(blob))
        place = self.places[MetadataIndex(keys[0])]
        self.edges.append((place.relative_path, start, blob))
        self.places |= {MetadataIndex(key): place for key in keys}
        self.tensors |= {key: BytesStorageMetadata() for key in keys}

    def _place(self, index: MetadataIndex, length: int) -> int:
        if self.ends[-1] and self.ends[-1] + length > FILE_BYTES:
            self.ends.append(0)
        start = -(-self.ends[-1] // ALIGN) * ALIGN
        self.ends[-1] = start + length
        self.places[index] = _StorageInfo(f"__0_{len(self.ends) - 1}.distcp", start, length)
        return start

    @property
    def nbytes(self) -> int:
        """Bytes of all files planned so far."""
        return sum(self.ends)

    def open(self, folder: Path) -> None:
        """Create the files at their full size."""
        self.folder = folder
        self.files = {
            f"__0_{i}.distcp": OutputFile(folder / f"__0_{i}.distcp", size)
            for i, size in enumerate(self.ends)
        }
        for file, position, edge in self.edges:
            self.files[file].write(edge, position)

    def write(self, slot: Slot, tensor: torch.Tensor) -> None:
        """Write one planned chunk's data, `slot.nbytes` long. Any thread."""
        assert tensor.nbytes == slot.nbytes
        self.files[slot.file].write(raw(tensor.contiguous()), slot.start)

    def read(self, slot: Slot) -> torch.Tensor:
        """What the file holds there, as uint8. Any thread."""
        return self.files[slot.file].read(slot.start, slot.nbytes)

    def finish(self, content: dict[str, Any]) -> None:
        """Close the files and write `.metadata`, `common.pt` and, last, `metadata.json`."""
        for file in self.files.values():
            file.close()
        metadata = Metadata(self.tensors, storage_data=self.places, version="1.0.0")
        (self.folder / ".metadata").write_bytes(pickle.dumps(metadata))
        (self.folder / "common.pt").write_bytes(serialise({"content_metadata": content}))
        (self.folder / "metadata.json").write_text(json.dumps(CONFIG))


def find_names(keys: Any) -> str:
    """`native` or `te`, by the norm before attention."""
    return "native" if "decoder.layers.input_layernorm.weight" in keys else "te"


def expected_tensors(hf: HfConfig, names: str) -> dict[str, tuple[int, ...]]:
    """Global name -> shape of every weight that config.json implies."""
    return {block.key: stacked_shape(block, hf) for block in blocks(hf, names)}
