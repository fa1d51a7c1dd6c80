"""Hugging Face folders: lazy slices in, complete folders out, and views of in-memory models."""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from iwopd_megatron.errors import RecipeError
from iwopd_megatron.mapping import entries
from iwopd_megatron.parallel import Parallel

SHARD_BYTES = 5 * 10**9
# Files of a model folder that do not go with it: its weights, and what describes them.
NO_COMPANION = (
    ".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".index.json",
    "manifest.json",
)  # fmt: skip


class HfTensors(Mapping):
    """Tensors of a folder by name, as lazy slices: only the bytes that are indexed are read."""

    def __init__(self, folder: Path):
        self.folder = folder
        index = folder / "model.safetensors.index.json"
        if index.is_file():
            files = _weight_map(index)
        elif (folder / "model.safetensors").is_file():
            files = dict.fromkeys(self._open("model.safetensors").keys(), "model.safetensors")
        else:
            raise RecipeError(
                f"{folder} has neither model.safetensors nor model.safetensors.index.json."
            )
        self._files = files
        self._handles: dict[str, Any] = {}
        self._names: dict[str, frozenset[str]] = {}

    def _open(self, file: str) -> Any:
        try:
            return safe_open(self.folder / file, framework="pt")
        except (SafetensorError, OSError) as error:
            raise RecipeError(
                f"{self.folder / file} cannot be read as safetensors: {error}."
            ) from None

    def __getitem__(self, name: str) -> Any:
        if name not in self._files:
            raise RecipeError(
                f"{self.folder} has no tensor '{name}' although its config.json implies it."
            )
        file = self._files[name]
        if file not in self._handles:
            handle = self._open(file)
            self._names[file] = frozenset(handle.keys())
            self._handles[file] = handle
        if name not in self._names[file]:
            raise RecipeError(f"{self.folder / file} lacks the tensor '{name}' of the index.")
        return self._handles[file].get_slice(name)

    def __contains__(self, name: object) -> bool:
        return name in self._files

    def __iter__(self):
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


def whole_tensors(folder: Path, is_tied: bool) -> Iterator[tuple[str, torch.Tensor]]:
    """A folder's tensors, one at a time, without the head that a tied model may store as well."""
    tensors = HfTensors(folder)
    for name in tensors:
        if not (is_tied and name == "lm_head.weight"):
            yield name, tensors[name][:]


class Loaded(NamedTuple):
    """What this rank read."""

    nbytes: int
    seconds: float


def _weight_map(index: Path) -> dict[str, str]:
    try:
        return dict(json.loads(index.read_text())["weight_map"])
    except (ValueError, KeyError, TypeError) as error:
        raise RecipeError(f"{index} is not a safetensors index: {error!r}.") from None


@torch.no_grad()
def load_shards(
    chunks: list[torch.nn.Module], sources: Mapping, hf: dict[str, Any], parallel: Parallel
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


def save_folder(folder: Path, tensors: Iterable[tuple[str, torch.Tensor]], template: Path) -> None:
    """Write a Hugging Face folder: sharded safetensors, index, template's config and tokenizer.

    It appears only when complete; an existing folder is replaced as the last act.
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
    copy_companions(template, partial)
    if folder.exists():
        shutil.rmtree(folder)
    partial.rename(folder)


def copy_companions(template: Path, folder: Path) -> None:
    """Copy config, generation config, tokenizer and chat templates: all that is no weight."""
    for file in template.rglob("*"):
        place = file.relative_to(template)
        is_hidden = any(part.startswith(".") for part in place.parts)
        if file.is_file() and not is_hidden and not file.name.endswith(NO_COMPANION):
            (folder / place).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(file, folder / place)


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
