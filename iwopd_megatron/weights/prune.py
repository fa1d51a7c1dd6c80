"""A Hugging Face folder without some of its model's layers: the student of a depth pruning.

Tensors of the layers that are kept are numbered anew; every byte of them is copied, in pieces, and
none is read as a number, so the folder may be of any dtype, scaled weights with their scales too.
Any family will do whose layers, and nothing else that has a number, are `model.layers.N.`.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from iwopd_megatron.errors import RecipeError
from iwopd_megatron.files import lock
from iwopd_megatron.files.rawfile import check_free, complete_folder
from iwopd_megatron.hf.companions import copy_companions
from iwopd_megatron.hf.config import read_json
from iwopd_megatron.hf.folder import Weight, stored_weights
from iwopd_megatron.weights import pieces
from iwopd_megatron.weights.fewer_layers import count_layers, without_layers
from iwopd_megatron.weights.safetensors_file import SafetensorsPlan, SafetensorsWriter

LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")
OTHER_NUMBER = re.compile(
    r"(?:^|\.)(?:layers?|blocks?|h)\.\d+\."
)  # of a tower, of a predictor of tokens


class Pruned(NamedTuple):
    """What was written: layers before and after, tensors, their bytes."""

    before: int
    after: int
    tensors: int
    nbytes: int


def drop_layers(source: Path, out: Path, dropped: Collection[int], force: bool = False) -> Pruned:
    """Write `source` without these layers to `out`, with tokenizer and all other companions.

    RecipeError where the folder has no such layer or nothing would be left, where a tensor or a
    setting may depend on layers in a way that is not known, and where `out` cannot be written.
    """
    content, file = read_json(source, "config.json"), source / "config.json"
    layers = count_layers(content, file)
    _check_layers(dropped, layers, source)
    stored = _stored(source, layers)
    config = without_layers(content, set(dropped), file)
    number = {old: new for new, old in enumerate(x for x in range(layers) if x not in dropped)}
    names = {_renamed(name, number): name for name in stored if _is_kept(name, number)}
    plan = SafetensorsPlan()
    for name, old in names.items():
        plan.add(name, stored[old].stored.shape, stored[old].stored.dtype)
    check_free(out, 0, force, (source,))
    with complete_folder(out, plan.nbytes, force, (source,)) as folder:
        _clear(folder)
        writer = SafetensorsWriter(plan, folder)
        for name, old in names.items():
            for first, rows in _rows(stored[old]):
                writer.write(name, rows, first)
        writer.close()
        copy_companions(source, folder)
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    return Pruned(layers, len(number), len(names), plan.nbytes)


def _check_layers(dropped: Collection[int], layers: int, source: Path) -> None:
    unknown = sorted(layer for layer in dropped if not 0 <= layer < layers)
    if unknown:
        raise RecipeError(
            f"{source} has no layer {unknown[0]}; its {layers} layers are 0 to {layers - 1}."
        )
    if not dropped:
        raise RecipeError(f"no layer of {source} is to be dropped; name one, e.g. --drop 1.")
    if len(set(dropped)) == layers:
        raise RecipeError(f"all {layers} layers of {source} would be dropped; keep one.")


def _stored(source: Path, layers: int) -> dict[str, Weight]:
    """Return a folder's tensors by name, file by file; RecipeError for layers beside LAYER's."""
    if (source / "adapter_config.json").is_file():
        raise RecipeError(
            f"{source} has an adapter_config.json, whose weights name layers by number; merge them "
            "into the model and save it whole."
        )
    stored = stored_weights(source)
    for name in stored:
        if not LAYER.fullmatch(name) and OTHER_NUMBER.search(name):
            raise RecipeError(
                f"{source}: the tensor {name} has a number and is none of model.layers.N; what "
                "becomes of it without some layers is not known."
            )
    found = {int(match[1]) for match in map(LAYER.fullmatch, stored) if match}
    if found != set(range(layers)):
        wrong = min(found ^ set(range(layers)))
        raise RecipeError(
            f"{source}: config.json says num_hidden_layers={layers}, but the tensors "
            f"{'have' if wrong in found else 'lack'} model.layers.{wrong}; layers of this model "
            "cannot be dropped."
        )
    return dict(
        sorted(stored.items(), key=lambda item: (item[1].stored.file.name, item[1].stored.start))
    )


def _is_kept(name: str, number: dict[int, int]) -> bool:
    match = LAYER.fullmatch(name)
    return match is None or int(match[1]) in number


def _renamed(name: str, number: dict[int, int]) -> str:
    """Return a tensor's new name; that of a dropped layer stays, and means nothing."""
    match = LAYER.fullmatch(name)
    if match is None:
        return name
    return f"model.layers.{number.get(int(match[1]), match[1])}.{match[2]}"


def _rows(weight: Weight) -> Iterator[tuple[int, torch.Tensor]]:
    """Yield (first row, the bytes of rows from there on as uint8), at most PIECE_BYTES at a time.

    A single row may be longer.
    """
    stored = weight.stored
    rows = stored.shape[0] if stored.shape else 1
    row_bytes = (stored.stop - stored.start) // max(1, rows)
    step = max(1, pieces.PIECE_BYTES // max(1, row_bytes))
    with stored.file.open("rb") as stream:
        stream.seek(stored.start)
        for first in range(0, rows, step):
            data = bytearray(stream.read(min(step, rows - first) * row_bytes))
            if data:
                yield first, torch.frombuffer(data, dtype=torch.uint8)


def _clear(folder: Path) -> None:
    """Remove what an interrupted run left, which is written anew."""
    for path in folder.iterdir():
        if path.name != lock.NAME:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
