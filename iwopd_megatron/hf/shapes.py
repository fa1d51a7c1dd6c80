"""Every tensor of a Hugging Face folder and its shape, from the model's description. No torch."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from functools import cache

from iwopd_megatron.hf.config import HfConfig
from iwopd_megatron.hf.families import FAMILIES, rows
from iwopd_megatron.hf.families.rows import Row

EMBEDDING, HEAD = (row.tensors[0].name for row in (rows.EMBEDDING, rows.HEAD))
_NUMBERS = (r"\.layers\.\d+\.", ".layers.{layer}."), (r"\.experts\.\d+\.", ".experts.{expert}.")


def rows_in_order(hf: HfConfig) -> Iterator[tuple[Row, dict[str, int]]]:
    """Yield every row that a model has, with its layer's and expert's number where it has one.

    In the order of the network; an expert's rows together.
    """
    rows = [row for row in hf.family.rows if not row.needs or getattr(hf, row.needs)]
    layers = [row for row in rows if row.is_of_layer]
    before = rows.index(layers[0])
    yield from ((row, {}) for row in rows[:before])
    for layer in range(hf.num_hidden_layers):
        kind = "experts" if hf.has_experts(layer) else "dense"
        own = [row for row in layers if row.layers in ("", kind)]
        yield from ((row, {"layer": layer}) for row in own if not row.is_of_expert)
        for expert in range(hf.num_experts):
            numbers = {"layer": layer, "expert": expert}
            yield from ((row, numbers) for row in own if row.is_of_expert)
    yield from ((row, {}) for row in rows[before + len(layers) :])


def hf_names(hf: HfConfig) -> Iterator[str]:
    """Yield the names of the tensors that config.json implies; a tied head is not one."""
    for row, numbers in rows_in_order(hf):
        yield from (tensor.name.format(**numbers) for tensor in row.tensors)


def hf_shape(name: str, hf: HfConfig) -> tuple[int, ...]:
    """Return the shape that config.json implies for a Hugging Face tensor; KeyError for another."""
    for pattern, placeholder in _NUMBERS:
        name = re.sub(pattern, placeholder, name)
    return tuple(getattr(hf, size) for size in _sizes(hf.model_type)[name])


@cache
def _sizes(model_type: str) -> Mapping[str, tuple[str, ...]]:
    """Return the names of every tensor's sizes by its name."""
    own = FAMILIES[model_type].rows
    return {tensor.name: tensor.sizes for row in own for tensor in row.tensors}
