"""The checks of a Hugging Face folder that every command makes before anything starts.

Every tensor that config.json implies, no other, in its shape and a dtype that can be read; scales
beside scaled weights; a tied head that is the embedding. Reads headers and, of a tied model that
stores its head as well, the two tables. Imports no torch.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from iwopd_megatron.errors import RecipeError
from iwopd_megatron.files.typed_json import TypedJson
from iwopd_megatron.hf.config import HfConfig, read_hf_config, read_json
from iwopd_megatron.hf.headers import Stored, stored_tensors
from iwopd_megatron.hf.quantization import SCALE_DTYPES, SCALED, Quantization
from iwopd_megatron.hf.shapes import EMBEDDING, HEAD, hf_names, hf_shape

PLAIN = ("F64", "F32", "BF16", "F16")
BLOCK = 2**24  # bytes compared at a time


class Scales(NamedTuple):
    """A scaled weight's scales: their tensor, and the rows and columns that one scale is for."""

    name: str
    stored: Stored
    block: tuple[int, int]
    rounds_product: bool  # see Quantization


class Weight(NamedTuple):
    """A weight as it is stored; `scales` is None for a plain one."""

    stored: Stored
    scales: Scales | None = None


def check_model(folder: Path, weights: bool = True) -> HfConfig:
    """Return a model's description; RecipeError if its folder is unfit.

    Looks at config and tokenizer files, and at the weights' headers if `weights`.
    """
    hf = read_hf_config(folder)
    if not any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json")):
        raise RecipeError(
            f"{folder} has no tokenizer.json; copy the model's tokenizer files there."
        )
    if weights:
        check_weights(folder, hf)
    return hf


def check_weights(folder: Path, hf: HfConfig) -> dict[str, Weight]:
    """Return what `find_weights` does, and refuse weights that config.json does not imply.

    RecipeError names the first, or a tied model's stored head that is not its embedding.
    """
    weights = find_weights(folder, hf)
    _check_tied_head(folder, hf, weights)
    return weights


def find_weights(folder: Path, hf: HfConfig) -> dict[str, Weight]:
    """Return every weight of the folder by name, a tied model's second copy of its head included.

    RecipeError where a tensor is missing, extra, or of a shape or dtype that config.json does
    not imply.
    """
    if (folder / "adapter_config.json").is_file():
        raise RecipeError(
            f"{folder} has an adapter_config.json: the weights of an adapter (LoRA) are not those "
            "of a model; merge them into the model and save it whole."
        )
    stored = stored_tensors(folder)
    names = list(hf_names(hf)) + [HEAD] * (hf.tie_word_embeddings and HEAD in stored)
    found = {name: _weight(folder, hf, name, stored) for name in names}
    scaled = [weight.scales.name for weight in found.values() if weight.scales is not None]
    extra = sorted(stored.keys() - {*names, *scaled})
    if hf.family.predicts_ahead:
        extra = [name for name in extra if not _is_after_last(name, hf)]
    if extra:
        raise RecipeError(
            f"{folder} has the tensor '{extra[0]}', which its config.json does not imply."
        )
    if hf.quantization and not scaled:
        raise RecipeError(
            f"{folder}: config.json has a quantization_config, but no weight is stored as "
            f"{SCALED} with scales; remove it there."
        )
    return found


def _is_after_last(name: str, hf: HfConfig) -> bool:
    """Return whether a tensor is of a layer that is numbered after the last."""
    layer = re.match(r"model\.layers\.(\d+)\.", name)
    return layer is not None and int(layer[1]) >= hf.num_hidden_layers


def stored_weights(folder: Path) -> dict[str, Weight]:
    """Return every tensor of the folder's weight files by name, unchecked, as a plain weight."""
    return {name: Weight(own) for name, own in stored_tensors(folder).items()}


def _weight(folder: Path, hf: HfConfig, name: str, stored: dict[str, Stored]) -> Weight:
    if name not in stored:
        raise RecipeError(f"{folder} has no tensor '{name}' although its config.json implies it.")
    own, shape = stored[name], hf_shape(name, hf)
    if own.shape != shape:
        raise RecipeError(f"{folder}: {name} is {own.shape}, config.json implies {shape}.")
    if own.dtype in PLAIN:
        return Weight(own)
    if own.dtype != SCALED or len(shape) != 2:
        raise RecipeError(
            f"{folder}: {name} is {own.dtype}; only {', '.join(PLAIN)}, and matrices of {SCALED} "
            "with scales, can be read: use a folder of the model in one of these."
        )
    if hf.quantization is None:
        raise RecipeError(
            f"{folder}: {name} is {own.dtype}, but config.json has no quantization_config that "
            "says how it is scaled; copy the model's original config.json."
        )
    return Weight(own, _scales(folder, hf.quantization, name, stored))


def _scales(
    folder: Path, quantization: Quantization, name: str, stored: dict[str, Stored]
) -> Scales:
    """Return the scales of a scaled weight; RecipeError where they are missing or unfit."""
    own = stored[name]
    scale_name = quantization.scale_of(name)
    scale = stored.get(scale_name)
    if scale is None:
        raise RecipeError(
            f"{folder}: {name} is {own.dtype} and its scales '{scale_name}' are missing."
        )
    block = quantization.block(own.shape, scale.shape)
    if scale.dtype not in SCALE_DTYPES or block is None:
        raise RecipeError(
            f"{folder}: {scale_name} is {scale.dtype} {scale.shape}, which config.json's "
            f"quantization_config does not imply for a weight of {own.shape}."
        )
    return Scales(scale_name, scale, block, quantization.rounds_product)


def _check_tied_head(folder: Path, hf: HfConfig, weights: dict[str, Weight]) -> None:
    """Refuse a tied model that stores a head other than its embedding."""
    if not hf.tie_word_embeddings or HEAD not in weights:
        return
    ours, theirs = weights[EMBEDDING], weights[HEAD]
    is_same = ours.stored.dtype == theirs.stored.dtype and _same_bytes(ours.stored, theirs.stored)
    if is_same and ours.scales is not None and theirs.scales is not None:
        is_same = _same_bytes(ours.scales.stored, theirs.scales.stored)
    if not is_same:
        raise RecipeError(
            f"{folder}: {HEAD} differs from {EMBEDDING} although config.json ties them; "
            "write tie_word_embeddings=false there, or remove it."
        )


def _same_bytes(a: Stored, b: Stored) -> bool:
    return a.stop - a.start == b.stop - b.start and all(
        x == y for x, y in zip(_pieces(a), _pieces(b), strict=True)
    )


def _pieces(stored: Stored) -> Iterator[bytes]:
    with stored.file.open("rb") as stream:
        stream.seek(stored.start)
        for start in range(stored.start, stored.stop, BLOCK):
            yield stream.read(min(BLOCK, stored.stop - start))


def eos_ids(folder: Path) -> set[int]:
    """Return the ids that end an answer: generation_config.json's, or config.json's without any.

    RecipeError where neither names one.
    """
    hf, file = read_hf_config(folder), folder / "generation_config.json"
    ids = hf.eos_token_ids
    if file.is_file():
        ids = TypedJson(read_json(folder, file.name), file).ids("eos_token_id") or ids
    if not ids:
        raise RecipeError(f"{folder}: neither config names an eos_token_id; add it to config.json.")
    if max(ids) >= hf.vocab_size:
        raise RecipeError(
            f"{file}: eos_token_id {max(ids)} is not below vocab_size={hf.vocab_size}; "
            "copy the model's original files."
        )
    return set(ids)
