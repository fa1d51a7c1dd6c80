"""manifest.json: every tensor's shape, dtype and hash, so that a conversion can prove itself.

{"config": what of config.json enters the mathematics,
 "tensors": {Hugging Face name: {"shape", "dtype" as safetensors names it, "xxh3_64"}}}
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, TypedDict

import torch
import xxhash

from iwopd_megatron.errors import RecipeError
from iwopd_megatron.files.rawfile import raw
from iwopd_megatron.hf.config import HfConfig
from iwopd_megatron.weights import pieces
from iwopd_megatron.weights.sharding import TensorSlice

NAME = "manifest.json"
DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
# Fields of HfConfig that change what a model computes, beside its rotary settings.
ESSENTIALS = (
    "model_type",
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "rms_norm_eps",
    "max_position_embeddings",
    "num_experts",
    "tie_word_embeddings",
)
EXPERT_ESSENTIALS = ("moe_intermediate_size", "num_experts_per_tok", "norm_topk_prob")
ROUTER_ESSENTIALS = (
    "first_k_dense_replace",
    "routed_scaling_factor",
    "n_group",
    "topk_group",
)
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class ManifestEntry(TypedDict):
    """What a manifest says of one tensor; `dtype` as safetensors names it."""

    shape: list[int]
    dtype: str
    xxh3_64: str


class Manifest(TypedDict):
    """The content of manifest.json."""

    config: dict[str, Any]
    tensors: dict[str, ManifestEntry]


class TensorDigest:
    """xxh3_64 of a tensor's bytes, fed row block by row block in order."""

    def __init__(self) -> None:
        self._hash = xxhash.xxh3_64()

    def update(self, rows: torch.Tensor) -> None:
        """Add the next rows, on the CPU."""
        self._hash.update(raw(rows.contiguous()))

    def hex(self) -> str:
        """Return the hash of all rows so far."""
        return self._hash.hexdigest()


def entry(shape: tuple[int, ...] | list[int], dtype: str, digest: str) -> ManifestEntry:
    """Return a tensor's entry."""
    return {"shape": list(shape), "dtype": dtype, "xxh3_64": digest}


def hash_tensor(tensor: TensorSlice, name: str, folder: Path) -> ManifestEntry:
    """Read a tensor in pieces of PIECE_BYTES; RecipeError unless its dtype is one of DTYPES."""
    shape, dtype, digest = tensor.get_shape(), tensor.get_dtype(), TensorDigest()
    if dtype not in DTYPES:
        raise RecipeError(f"{folder}: {name} is {dtype}, not a plain float.")
    row_bytes = math.prod(shape[1:]) * DTYPES[dtype].itemsize
    step = max(1, pieces.PIECE_BYTES // max(1, row_bytes))
    for first in range(0, shape[0], step):
        digest.update(tensor[first : first + step])
    return entry(shape, dtype, digest.hex())


def essentials(hf: HfConfig) -> dict[str, Any]:
    """Return what of a config changes the model's output, the same from any transformers."""
    keys = ESSENTIALS + EXPERT_ESSENTIALS * (hf.num_experts > 0)
    keys += ("shared_expert_intermediate_size",) * (hf.shared_expert_intermediate_size > 0)
    keys += ROUTER_ESSENTIALS * hf.sigmoid_router
    keys += ("attention_window",) * (hf.attention_window > 0)
    return {key: getattr(hf, key) for key in keys} | hf.rope.essentials()


def write(folder: Path, hf: HfConfig, tensors: dict[str, ManifestEntry]) -> None:
    """Write a folder's manifest.json."""
    content: Manifest = {"config": essentials(hf), "tensors": tensors}
    (folder / NAME).write_text(json.dumps(content, indent=1))


def read(path: Path) -> Manifest | None:
    """Read the manifest of a folder, or such a file itself; None where there is none.

    RecipeError if the file is no manifest.
    """
    file = path / NAME if path.is_dir() else path
    if not file.is_file():
        return None
    try:
        content = json.loads(file.read_text())
    except ValueError as error:
        raise RecipeError(f"{file} is not valid JSON: {error}.") from None
    if not isinstance(content, dict) or not {"config", "tensors"} <= content.keys():
        raise RecipeError(f"{file} is not a manifest of this converter; move it away.")
    return {"config": content["config"], "tensors": content["tensors"]}


def verify_config(manifest: Manifest | None, hf: HfConfig, folder: Path) -> None:
    """Raise RecipeError if a config is not the one the manifest was made with."""
    for key, value in essentials(hf).items():
        before = value if manifest is None else manifest["config"].get(key)
        if before != value:
            raise RecipeError(
                f"{folder}/config.json: {key} is {value}, but {before} in the input's {NAME}; "
                "use the config.json that belongs to these weights."
            )


def verify_tensors(
    manifest: Manifest | None, tensors: dict[str, ManifestEntry], folder: Path
) -> None:
    """Raise RecipeError if tensors differ from what the manifest says was there."""
    for name, found in tensors.items():
        before = found if manifest is None else manifest["tensors"].get(name)
        if before != found:
            raise RecipeError(
                f"{name} is not what {folder / NAME} says ({found} instead of {before}); "
                f"the files are damaged, or were changed and {NAME} has to go."
            )
