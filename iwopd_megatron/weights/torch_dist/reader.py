"""Read any row range of a `torch_dist` checkpoint's global tensors, whatever layout cut its chunks.

Files are mapped, not read: where one chunk holds all that is asked for, nothing is copied (torch's
reader loads a whole chunk for any part of it). Plain blobs are found by their envelope (see
blob.py); torch.load reads any other.
`.metadata` is a pickle, as torch reads it: open only checkpoints that you trust.
"""

from __future__ import annotations

import io
import itertools
import json
import math
import mmap
import pickle
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch

from iwopd_megatron.errors import RecipeError
from iwopd_megatron.weights.torch_dist.blob import data_start
from iwopd_megatron.weights.torch_dist.torch_internals import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageInfo,
    TensorStorageMetadata,
)

# The weights of a model begin so; optimiser states, schedules and generators do not.
_MODEL = ("embedding.", "decoder.", "output_layer.")


class CheckpointReader:
    """A checkpoint folder's weights by global name, without optimiser states and objects."""

    def __init__(self, folder: Path):
        """Open a folder; RecipeError if it is no checkpoint, or a file is missing or truncated."""
        self.folder = folder
        _check_format(folder)
        metadata = _read_metadata(folder / ".metadata")
        self.places: dict[MetadataIndex, StorageInfo] = metadata.storage_data
        self.tensors: dict[str, TensorStorageMetadata] = {
            key: tensor
            for key, tensor in metadata.state_dict_metadata.items()
            if isinstance(tensor, TensorStorageMetadata) and key.startswith(_MODEL)
        }
        self._check_files()
        self._maps: dict[str, mmap.mmap] = {}
        self._chunks: dict[tuple[str, tuple[int, ...]], list[ChunkStorageMetadata]] = {}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return global name -> shape of every weight."""
        return {key: tuple(tensor.size) for key, tensor in self.tensors.items()}

    def dtype(self, key: str) -> torch.dtype:
        """Return a global tensor's dtype."""
        return self.tensors[key].properties.dtype

    def index(self, key: str, lead: int) -> None:
        """Sort a tensor's chunks by their place in its first `lead` dims, before any `read`."""
        for chunk in self.tensors[key].chunks:
            spans = zip(chunk.offsets[:lead], chunk.sizes[:lead], strict=True)
            for place in itertools.product(*(range(a, a + n) for a, n in spans)):
                self._chunks.setdefault((key, place), []).append(chunk)

    def read(self, key: str, place: tuple[int, ...], first: int, last: int) -> torch.Tensor:
        """Return `tensor[place][first:last]`, a view of the file where one chunk holds it whole.

        RecipeError if the chunks do not cover it. `index` comes before.
        """
        lead = len(place)
        shape = (last - first, *self.tensors[key].size[lead + 1 :])
        out, filled = None, 0
        for chunk in self._chunks.get((key, place), []):
            offset, size = chunk.offsets[lead:], chunk.sizes[lead:]
            start, stop = max(first, offset[0]), min(last, offset[0] + size[0])
            if start >= stop:
                continue
            index = [p - o for p, o in zip(place, chunk.offsets[:lead], strict=True)]
            part = self._load(key, chunk)[tuple(index)][start - offset[0] : stop - offset[0]]
            if part.shape == shape:
                return part
            out = torch.empty(shape, dtype=part.dtype) if out is None else out
            spans = zip(offset[1:], size[1:], strict=True)
            out[(slice(start - first, stop - first), *(slice(a, a + n) for a, n in spans))] = part
            filled += part.numel()
        if out is None or filled != out.numel():
            raise RecipeError(f"{self.folder} lacks a part of {key}{list(place)}.")
        return out

    def _load(self, key: str, chunk: ChunkStorageMetadata) -> torch.Tensor:
        place = self.places[MetadataIndex(key, chunk.offsets)]
        if place.relative_path not in self._maps:
            with (self.folder / place.relative_path).open("rb") as file:
                self._maps[place.relative_path] = mmap.mmap(file.fileno(), 0, mmap.MAP_PRIVATE)
        whole = memoryview(self._maps[place.relative_path])
        blob = whole[place.offset : place.offset + place.length]
        shape, dtype = tuple(chunk.sizes), self.dtype(key)
        start = data_start(blob, shape, dtype)
        if start is None:
            return torch.load(io.BytesIO(blob), map_location="cpu", weights_only=True).view(shape)
        count, offset = math.prod(shape), place.offset + start
        return torch.frombuffer(whole, dtype=dtype, count=count, offset=offset).view(shape)

    def _check_files(self) -> None:
        for name, end in _ends(self.tensors, self.places):
            file = self.folder / name
            if not file.is_file():
                raise RecipeError(f"{file} is missing although .metadata names it.")
            if file.stat().st_size < end:
                raise RecipeError(
                    f"{file} is truncated: it has {file.stat().st_size} bytes, "
                    f".metadata implies {end}."
                )


def _ends(
    tensors: Mapping[str, TensorStorageMetadata], places: Mapping[MetadataIndex, StorageInfo]
) -> Iterator[tuple[str, int]]:
    """Yield each file that holds weights and how many bytes it must have."""
    ends: dict[str, int] = {}
    for index, place in places.items():
        if index.fqn in tensors:
            end = place.offset + place.length
            ends[place.relative_path] = max(ends.get(place.relative_path, 0), end)
    yield from ends.items()


def _check_format(folder: Path) -> None:
    file = folder / "metadata.json"
    if not file.is_file() or not (folder / ".metadata").is_file():
        kinds = ("round_??????", "checkpoints/round_??????", "iter_???????")
        inside = sorted(found for kind in kinds for found in folder.glob(kind))
        hint = f"; name one of its checkpoints, e.g. {inside[-1]}" if inside else ""
        raise RecipeError(
            f"{folder} has no metadata.json and .metadata; it is not a torch_dist checkpoint{hint}."
        )
    try:
        kind = json.loads(file.read_text()).get("sharded_backend")
    except (ValueError, AttributeError):
        raise RecipeError(f"{file} is not valid JSON.") from None
    if kind != "torch_dist":
        raise RecipeError(f"{file}: sharded_backend '{kind}' is not supported; save torch_dist.")


def _read_metadata(file: Path) -> Metadata:
    try:
        metadata = pickle.loads(file.read_bytes())
    except Exception as error:  # a damaged pickle may raise anything
        raise RecipeError(f"{file} cannot be read: {error}.") from None
    if not isinstance(metadata, Metadata):
        raise RecipeError(f"{file} holds a {type(metadata).__name__}, not checkpoint metadata.")
    return metadata
