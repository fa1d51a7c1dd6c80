"""Complete Hugging Face folders written from a stream of tensors, at most one file's in memory."""

from __future__ import annotations

import json
import shutil
from collections.abc import Collection, Iterable
from pathlib import Path

import torch
from safetensors.torch import save_file

from iwopd_megatron.hf.companions import write_companions
from iwopd_megatron.weights import shards
from iwopd_megatron.weights.shards import INDEX, index_content, plan_shards


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
    _write_shards(partial, tensors)
    write_companions(template, partial, eos_ids)
    if folder.exists():
        shutil.rmtree(folder)
    partial.rename(folder)


def _write_shards(folder: Path, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Write each file as soon as it is full; names say how many there are, so they come last.

    huggingface_hub's splitter wants all tensors at once, which a stream has not. It cuts greedily,
    so a file that is full stays as it is whatever follows: tensors not yet written are split anew.
    """
    written: list[Path] = []
    nbytes: dict[str, int] = {}  # of all tensors so far
    waiting: dict[str, int] = {}  # of those that are in no file yet
    held: dict[str, torch.Tensor] = {}

    def write(shard: dict[str, torch.Tensor]) -> None:
        written.append(folder / f"shard-{len(written)}")
        save_file(shard, written[-1], metadata={"format": "pt"})

    for name, tensor in tensors:
        nbytes[name] = waiting[name] = tensor.nbytes
        if sum(waiting.values()) > shards.SHARD_BYTES:
            *full, rest = plan_shards(waiting).filename_to_tensors.values()
            for names in full:  # before the new tensor takes memory, unless it is one of them
                write({key: _own(tensor) if key == name else held.pop(key) for key in names})
            waiting = {key: nbytes[key] for key in rest}
        if name in waiting:
            held[name] = _own(tensor)
    write(held)
    split = plan_shards(nbytes)
    for file, title in zip(written, split.filename_to_tensors, strict=True):
        file.rename(folder / title)
    if split.is_sharded:
        (folder / INDEX).write_text(json.dumps(index_content(split), indent=2))


def _own(tensor: torch.Tensor) -> torch.Tensor:
    """Return a contiguous copy on the CPU: the stream may use the memory again."""
    return tensor.detach().cpu().contiguous().clone()
