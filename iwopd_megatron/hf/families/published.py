"""Published config.json files in short: what a line of models has in common, and a row of sizes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

DENSE = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
)


def published(
    common: Mapping[str, Any],
    sizes: Mapping[str, Sequence[float]],
    names: Sequence[str] = DENSE,
    **others: Mapping[str, Any],
) -> dict[str, dict[str, Any]]:
    """Return the configs of models, by folder name: `common`, their sizes, and what is their own.

    sizes: one number for each of `names`, by the model's name; a comma lists several models of
    the same sizes. others: a value for some models by a setting's name, {model: value}.
    """
    found = {
        name: dict(common) | dict(zip(names, row, strict=True))
        for key, row in sizes.items()
        for name in key.split(", ")
    }
    for setting, values in others.items():
        for name, value in values.items():
            found[name][setting] = value
    return found
