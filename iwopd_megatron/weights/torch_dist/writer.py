"""Megatron `torch_dist` checkpoints without a model or a process group, one chunk at a time.

A checkpoint holds global tensors by name, each as chunks (offset, size) in `__*.distcp` files;
`.metadata` says where. Layers are stacked on the first dim, a layer's experts on the second.
Chunks may be cut anywhere, so one written here is one piece (pieces.py). torch's writer begins its
files anew; here an interrupted conversion finds each chunk in its planned place.

`native` names are checked against Megatron's own load and save in every layout. `te` names differ
in the norms; TransformerEngine does not run on a CPU: bench/gpu_checkpoint.py checks them on a GPU.
"""

from __future__ import annotations

import json
import math
import pickle
from argparse import Namespace
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
# metadata.json as Megatron-Core 0.16.1 writes it (dist_checkpointing/core.py, CheckpointingConfig)
CONFIG = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}
_LINEARS = ["self_attention.linear_qkv", "self_attention.linear_proj"]
# Modules that may keep a state of their own, for which Megatron stores None beside the weights.
_STATEFUL = {
    "native": _LINEARS,
    "te": [*_LINEARS, "self_attention.q_layernorm", "self_attention.k_layernorm"],
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
    stacked = (hf.num_hidden_layers, hf.num_experts)[: len(block.place)]
    return stacked + block_shape(block, hf)


def object_keys(hf: HfConfig, names: str) -> list[str]:
    """Return names of the empty `_extra_state` objects that Megatron's load asks for.

    `<module>._extra_state/shard_<offset>_<shape>`, by ShardedObject of Megatron-Core 0.16.1.
    """
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


class CheckpointPlan:
    """The chunks and empty objects of a checkpoint, each with its place in the files."""

    def __init__(self) -> None:
        self.tensors: dict[str, TensorStorageMetadata] = {}
        self.objects: dict[str, BytesStorageMetadata] = {}
        self.places: dict[MetadataIndex, StorageInfo] = {}
        self.sizes: list[int] = [0]  # bytes planned for each file
        self.edges: list[tuple[str, int, bytes]] = []  # file, position, what is around the data

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
        place = self._place(edge.length(nbytes))
        self.places[MetadataIndex(key, chunk.offsets)] = place
        slot = Slot(place.relative_path, place.offset + len(edge.before), nbytes)
        self.edges.append((slot.file, place.offset, edge.before))
        self.edges.append((slot.file, slot.start + nbytes, edge.after))
        return slot

    def add_objects(self, keys: Iterable[str]) -> None:
        """Plan empty objects; all of them are one blob in the file."""
        blob = serialise([None])
        place = self._place(len(blob))
        self.edges.append((place.relative_path, place.offset, blob))
        for key in keys:
            self.places[MetadataIndex(key)] = place
            self.objects[key] = BytesStorageMetadata()

    def _place(self, length: int) -> StorageInfo:
        if self.sizes[-1] and self.sizes[-1] + length > FILE_BYTES:
            self.sizes.append(0)
        start = -(-self.sizes[-1] // ALIGN) * ALIGN
        self.sizes[-1] = start + length
        return StorageInfo(_file_name(len(self.sizes) - 1), start, length)

    @property
    def nbytes(self) -> int:
        """Bytes of all files."""
        return sum(self.sizes)

    def metadata(self) -> Metadata:
        """Return what `.metadata` is a pickle of."""
        items: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {}
        items |= self.tensors
        items |= self.objects
        return Metadata(items, storage_data=self.places, version=METADATA_VERSION)


class CheckpointWriter:
    """The files of a plan, open at their full size: chunks are written in any order."""

    def __init__(self, plan: CheckpointPlan, folder: Path):
        """Create the files, or go on with those that an interrupted run left."""
        self._plan, self._folder = plan, folder
        self._files = {
            _file_name(i): OutputFile(folder / _file_name(i), size)
            for i, size in enumerate(plan.sizes)
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

    def finish(self, content: Mapping[str, Any], args: Namespace | None = None) -> None:
        """Close the files and write `.metadata`, `common.pt` and, last, `metadata.json`.

        `content` is what Megatron calls a checkpoint's content metadata (METADATA); `args` what
        some programs ask of the one that wrote it.
        """
        common = {"content_metadata": dict(content)} | ({"args": args} if args else {})
        for file in self._files.values():
            file.close()
        (self._folder / ".metadata").write_bytes(pickle.dumps(self._plan.metadata()))
        (self._folder / "common.pt").write_bytes(serialise(common))
        (self._folder / "metadata.json").write_text(json.dumps(CONFIG))


def _file_name(number: int) -> str:
    """Return the name that torch gives file `number` of rank 0."""
    return f"__0_{number}.distcp"


def find_names(keys: Collection[str]) -> str:
    """Return whose module names global tensors have, `native` or `te`."""
    return "native" if "decoder.layers.input_layernorm.weight" in keys else "te"


def expected_tensors(hf: HfConfig, names: str) -> dict[str, tuple[int, ...]]:
    """Return global name -> shape of every weight that config.json implies."""
    return {block.key: stacked_shape(block, hf) for block in weight_blocks(hf, names)}
