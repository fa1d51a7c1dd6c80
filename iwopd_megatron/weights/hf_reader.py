"""Hugging Face folders: lazy slices in, complete folders out, and views of in-memory models."""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from iwopd_megatron.errors import RecipeError
from iwopd_megatron.hf.companions import write_companions
from iwopd_megatron.hf.config import HfConfig, read_hf_config
from iwopd_megatron.hf.folder import Weight, find_weights
from iwopd_megatron.hf.headers import Stored, stored_tensors
from iwopd_megatron.hf.shapes import HEAD
from iwopd_megatron.runtime.parallel import Parallel
from iwopd_megatron.weights.scaled_tensors import ScaledSlice
from iwopd_megatron.weights.table import entries

SHARD_BYTES = 5 * 10**9


class HfTensors(Mapping):
    """Weights of a folder by name, as lazy slices: only the bytes that are indexed are read.

    Scaled weights (FP8) come out multiplied, in `scaled_dtype` where it is given, else fp32. The
    folder is checked when it is opened (`model_folder.find_weights`), unless `is_checked` is false:
    then all its tensors are here as they are stored, if its config does not say how they are
    scaled. A tied head that is stored as well is not among them unless `with_tied_head`.
    """

    def __init__(
        self,
        folder: Path,
        scaled_dtype: torch.dtype = torch.float32,
        with_tied_head: bool = False,
        is_checked: bool = True,
    ):
        self.folder, self.hf, self.scaled_dtype = folder, read_hf_config(folder), scaled_dtype
        if is_checked or self.hf.quantization:
            self._weights = find_weights(folder, self.hf)
        else:
            self._weights = {name: Weight(own) for name, own in stored_tensors(folder).items()}
        if self.hf.tie_word_embeddings and not with_tied_head:
            self._weights.pop(HEAD, None)
        self._handles: dict[Path, Any] = {}

    def __getitem__(self, name: str) -> Any:
        weight = self._weights[name]
        own = self._open(weight.stored).get_slice(name)
        if weight.scale is None:
            return own
        scale_name = self.hf.quantization.scale_of(name)
        scale = self._open(weight.scale).get_tensor(scale_name)
        rounds = self.hf.quantization.rounds_product
        return ScaledSlice(own, scale, weight.block, self.scaled_dtype, rounds)

    def _open(self, stored: Stored) -> Any:
        if stored.file not in self._handles:
            try:
                self._handles[stored.file] = safe_open(stored.file, framework="pt")
            except (SafetensorError, OSError) as error:
                raise RecipeError(
                    f"{stored.file} cannot be read as safetensors: {error}."
                ) from None
        return self._handles[stored.file]

    def __contains__(self, name: object) -> bool:
        return name in self._weights

    def __iter__(self):
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)


def whole_tensors(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """A folder's weights, one at a time."""
    tensors = HfTensors(folder)
    for name in tensors:
        whole = tensors[name][:]
        check_finite(whole, f"{folder}: {name}")
        yield name, whole


def check_finite(tensor: torch.Tensor, name: str) -> None:
    """Refuse weights that hold NaN or infinity; one pass, no copy."""
    if not all(bound.isfinite() for bound in torch.aminmax(tensor)):
        raise RecipeError(f"{name} holds NaN or infinity; copy the model's original weights.")


class Loaded(NamedTuple):
    """What this rank read."""

    nbytes: int
    seconds: float


@torch.no_grad()
def load_shards(
    chunks: list[torch.nn.Module], sources: Mapping, hf: HfConfig, parallel: Parallel
) -> Loaded:
    """Fill this rank's parameters from its own slices of `sources` (tensors or lazy, by name)."""
    start, nbytes = time.perf_counter(), 0
    for chunk in chunks:
        for entry in entries(chunk, hf):
            axis = parallel.etp if entry.is_expert else parallel.tp
            shard = entry.cut.shard(
                [sources[name] for name in entry.hf_names], axis.rank, axis.size, hf
            )
            if shard.shape != entry.parameter.shape:
                raise RecipeError(
                    f"{entry.hf_names[0]} has the wrong shape: its shard for {entry.name} is "
                    f"{tuple(shard.shape)}, config.json implies {tuple(entry.parameter.shape)}."
                )
            check_finite(shard, entry.hf_names[0])
            entry.parameter.copy_(shard)
            nbytes += shard.nbytes
    return Loaded(nbytes, time.perf_counter() - start)


def named_views(model: torch.nn.Module, gradients: bool = False) -> dict[str, torch.Tensor]:
    """Parameters (or their gradients) of a transformers model under on-disk names, as views.

    transformers 5 fuses a layer's experts in memory: gate_up_proj [E, 2F, D], down_proj [E, D, F].
    """
    views = {}
    for name, parameter in model.named_parameters():
        tensor = parameter.grad if gradients else parameter.data
        fused = re.fullmatch(r"(.*\.experts\.)(gate_up_proj|down_proj)", name)
        if fused is None:
            views[name] = tensor
        elif fused[2] == "down_proj":
            views.update({f"{fused[1]}{e}.down_proj.weight": x for e, x in enumerate(tensor)})
        else:
            for e, x in enumerate(tensor):
                views[f"{fused[1]}{e}.gate_proj.weight"], views[f"{fused[1]}{e}.up_proj.weight"] = (
                    x.chunk(2)
                )
    return views


def random_weights(folder: Path, seed: int) -> dict[str, torch.Tensor]:
    """Fresh fp32 weights for a folder's config, initialised as transformers does."""
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = AutoConfig.from_pretrained(folder)
        return named_views(AutoModelForCausalLM.from_config(config, dtype=torch.float32))


def save_folder(
    folder: Path,
    tensors: Iterable[tuple[str, torch.Tensor]],
    template: Path,
    eos_ids: Collection[int] = (),
) -> None:
    """Write a Hugging Face folder: sharded safetensors, index, template's config and tokenizer.

    `eos_ids` are what ends its answers, if not the template's. It appears only when complete; an
    existing folder is replaced as the last act.
    """
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    weight_map: dict[str, int] = {}
    shard: dict[str, torch.Tensor] = {}
    count = size = total = 0
    for name, tensor in tensors:
        if size and size + tensor.nbytes > SHARD_BYTES:
            save_file(shard, partial / f"shard-{count}", metadata={"format": "pt"})
            shard, count, size = {}, count + 1, 0
        shard[name] = tensor.detach().cpu().contiguous().clone()
        weight_map[name] = count
        size, total = size + tensor.nbytes, total + tensor.nbytes
    save_file(shard, partial / f"shard-{count}", metadata={"format": "pt"})
    _name_shards(partial, weight_map, count + 1, total)
    write_companions(template, partial, eos_ids)
    if folder.exists():
        shutil.rmtree(folder)
    partial.rename(folder)


def _name_shards(partial: Path, weight_map: dict[str, int], count: int, total: int) -> None:
    if count == 1:
        (partial / "shard-0").rename(partial / "model.safetensors")
        return
    names = [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    for i, name in enumerate(names):
        (partial / f"shard-{i}").rename(partial / name)
    index = {
        "metadata": {"total_size": total},
        "weight_map": {k: names[i] for k, i in weight_map.items()},
    }
    (partial / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
