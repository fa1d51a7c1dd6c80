"""Hugging Face folders read: their weights as lazy slices, and a rank's shards filled from them."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from safetensors import SafetensorError, safe_open

from iwopd_megatron.errors import RecipeError
from iwopd_megatron.hf.config import HfConfig, read_hf_config
from iwopd_megatron.hf.folder import Weight, find_weights, stored_weights
from iwopd_megatron.hf.shapes import HEAD
from iwopd_megatron.runtime import device
from iwopd_megatron.weights.scaled_tensors import ScaledSlice
from iwopd_megatron.weights.sharding import Source, TensorSlice
from iwopd_megatron.weights.table import mapped_parameters

if TYPE_CHECKING:
    from iwopd_megatron.runtime.megatron import GPTModel
    from iwopd_megatron.runtime.parallel import Parallel


class HfTensors(Mapping[str, TensorSlice]):
    """Weights of a folder by name, as lazy slices: only the bytes that are indexed are read.

    Scaled weights (FP8) come out multiplied, in `scaled_dtype`. Without `weights` the folder is
    checked (`hf.folder.find_weights`) and a tied head that is stored as well is left out; with
    them, they are what is here.
    """

    def __init__(
        self,
        folder: Path,
        scaled_dtype: torch.dtype = torch.float32,
        weights: Mapping[str, Weight] | None = None,
    ):
        self.folder, self.hf, self.scaled_dtype = folder, read_hf_config(folder), scaled_dtype
        self._weights = self._own_weights() if weights is None else weights
        self._handles: dict[Path, safe_open] = {}

    def _own_weights(self) -> dict[str, Weight]:
        weights = find_weights(self.folder, self.hf)
        if self.hf.tie_word_embeddings:
            weights.pop(HEAD, None)
        return weights

    def __getitem__(self, name: str) -> TensorSlice:
        weight = self._weights[name]
        own = self._open(weight.stored.file).get_slice(name)
        scales = weight.scales
        if scales is None:
            return own
        scale = self._open(scales.stored.file).get_tensor(scales.name)
        return ScaledSlice(own, scale, scales.block, self.scaled_dtype, scales.rounds_product)

    def _open(self, file: Path) -> safe_open:
        if file not in self._handles:
            try:
                self._handles[file] = safe_open(file, framework="pt")
            except (SafetensorError, OSError) as error:
                raise RecipeError(f"{file} cannot be read as safetensors: {error}.") from None
        return self._handles[file]

    def __contains__(self, name: object) -> bool:
        return name in self._weights

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)


def unchecked_weights(folder: Path) -> dict[str, Weight]:
    """Return every tensor of a folder as it is stored, whatever its config.json implies.

    Scaled weights need that config: such a folder is checked.
    """
    hf = read_hf_config(folder)
    if hf.quantization:
        return find_weights(folder, hf)
    return stored_weights(folder)


def whole_tensors(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield a folder's weights (name, tensor) one at a time; RecipeError if one is not finite."""
    for name, source in HfTensors(folder).items():
        whole = source[:]
        check_finite(whole, f"{folder}: {name}")
        yield name, whole


def check_finite(tensor: torch.Tensor, name: str) -> None:
    """Raise RecipeError if a tensor holds NaN or infinity; one pass, no copy."""
    if not all(math.isfinite(bound.item()) for bound in torch.aminmax(tensor)):
        raise RecipeError(f"{name} holds NaN or infinity; copy the model's original weights.")


class Loaded(NamedTuple):
    """How many bytes this rank read, in how many seconds."""

    nbytes: int
    seconds: float


@torch.no_grad()
def load_shards(
    chunks: list[GPTModel],
    sources: Mapping[str, Source],
    hf: HfConfig,
    parallel: Parallel,
    frozen: bool = False,
) -> Loaded:
    """Fill this rank's parameters from its own slices of whole tensors, by Hugging Face name.

    frozen: they are only read, so a shard in their dtype on their device takes their place. One
    that is a slice of a file stays there: its pages are the file's own, which need no memory of
    the process. RecipeError if a shard has not its parameter's shape, or is not finite.
    """
    start, nbytes = time.perf_counter(), 0
    for chunk in chunks:
        for mapped in mapped_parameters(chunk, hf):
            axis = parallel.etp if mapped.is_expert else parallel.tp
            whole = [sources[name] for name in mapped.hf_names]
            shard = mapped.sharding.shard(whole, axis.rank, axis.size, hf)
            if shard.shape != mapped.parameter.shape:
                raise RecipeError(
                    f"{mapped.hf_names[0]} has the wrong shape: its shard for {mapped.name} is "
                    f"{tuple(shard.shape)}, config.json implies {tuple(mapped.parameter.shape)}."
                )
            check_finite(shard, mapped.hf_names[0])
            own = mapped.parameter
            is_alike = shard.dtype == own.dtype and shard.device == own.device
            if frozen and is_alike and not device.is_rehearsed():
                own.data = shard.contiguous()
            else:
                own.copy_(shard)
            nbytes += shard.nbytes
    return Loaded(nbytes, time.perf_counter() - start)
