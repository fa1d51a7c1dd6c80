"""Single values of a config.json that every family reads alike. Imports no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from iwopd_megatron.errors import RecipeError
from iwopd_megatron.files.typed_json import TypedJson

DTYPES = ("float32", "bfloat16", "float16", "float64")


def check_layer_types(config: TypedJson) -> None:
    """Refuse layers that do not attend to all earlier positions."""
    types = config.content.get("layer_types")
    layers = config.count("num_hidden_layers")
    if types is not None and types != ["full_attention"] * layers:
        raise RecipeError(
            f"{config.file}: layer_types must be 'full_attention' for each of its {layers} layers; "
            "sliding windows are not supported."
        )


def dtype_name(content: dict[str, Any], file: Path | str) -> str:
    """Return the dtype's name: transformers 5 writes dtype, 4 wrote torch_dtype."""
    found = content.get("dtype") or content.get("torch_dtype") or "float32"
    if found not in DTYPES:
        raise RecipeError(f"{file}: dtype={found!r} must be one of {', '.join(DTYPES)}.")
    return found


def pad_id(config: TypedJson) -> int | None:
    """Return the pad token's id; None where config.json names none."""
    found = config.ids("pad_token_id")
    if len(found) > 1:
        raise RecipeError(f"{config.file}: pad_token_id={list(found)} must be one id.")
    return found[0] if found else None
