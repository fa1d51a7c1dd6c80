"""The weight table, read both ways (Hugging Face <-> Megatron shard).

A model family states its rows (hf/families): a Megatron parameter, how its tensor-parallel shard is
cut, and the Hugging Face tensors it is made of. Here they meet the parameters of a model, under the
torch-native names or TransformerEngine's, and a checkpoint's global tensors.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

import torch

from iwopd_megatron.hf.config import HfConfig
from iwopd_megatron.hf.families import FAMILIES
from iwopd_megatron.hf.families.rows import Row
from iwopd_megatron.hf.shapes import EMBEDDING, rows_in_order
from iwopd_megatron.weights.sharding import SHARDINGS, Sharding

if TYPE_CHECKING:
    from iwopd_megatron.runtime.megatron import GPTModel

UNTRAINED = ".expert_bias"  # how names of buffers end that are weights of a model
_LAYER = re.compile(r"decoder\.layers\.(\d+)\.")
_EXPERT = re.compile(r"(\.mlp\.experts\.\w+\.weight)(\d+)$")


@dataclass(frozen=True)
class MappedParameter:
    """One parameter of this rank and the whole Hugging Face tensors it is cut from."""

    name: str
    parameter: torch.Tensor
    sharding: Sharding
    hf_names: list[str]
    is_expert: bool
    is_copy: bool  # the last pipeline stage's copy of a tied embedding
    is_trained: bool = True  # no buffer


def mapped_parameters(chunk: GPTModel, hf: HfConfig) -> Iterator[MappedParameter]:
    """Yield every parameter of one model chunk, in its own order; KeyError if no row matches it.

    After them the buffers that are weights of the model.
    """
    trained = dict(chunk.named_parameters())
    for name, parameter in weights_of(chunk).items():
        row, cut, layer, expert = _find_row(name, hf)
        numbers, experts = {"layer": 0}, [0]
        if layer is not None:
            module = chunk.decoder.layers[layer]
            numbers["layer"] = module.layer_number - 1
            if row.is_of_expert:
                local = module.mlp.local_expert_indices
                experts = local if expert is None else [local[expert]]
        is_copy = hf.tie_word_embeddings and name == "output_layer.weight"
        templates = [EMBEDDING] if is_copy else [x.name for x in row.tensors]
        hf_names = [t.format(**numbers, expert=e) for e in experts for t in templates]
        yield MappedParameter(
            name, parameter, SHARDINGS[cut], hf_names, row.is_of_expert, is_copy, name in trained
        )


def weights_of(chunk: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return a chunk's parameters, then the buffers that are weights: routers' biases."""
    buffers = {name: x for name, x in chunk.named_buffers() if name.endswith(UNTRAINED)}
    return dict(chunk.named_parameters()) | buffers


def _find_row(name: str, hf: HfConfig) -> tuple[Row, str, int | None, int | None]:
    """Return a parameter's row, the name of its cut, and its layer's and expert's local numbers."""
    layer, expert = _LAYER.match(name), _EXPERT.search(name)
    pattern = _LAYER.sub("decoder.layers.{layer}.", name)
    pattern = _EXPERT.sub(r"\1{expert}", pattern)
    found = _rows(hf.model_type).get(pattern)
    if found is None:
        raise KeyError(f"the family {hf.model_type} has no row for Megatron parameter {name}")
    return *found, layer and int(layer[1]), expert and int(expert[2])


@cache
def _rows(model_type: str) -> dict[str, tuple[Row, str]]:
    """Return rows and cuts of a family by the parameter's name, whoever's name that is."""
    rows = FAMILIES[model_type].rows
    found = {name: (row, row.cut) for row in rows for name in (row.parameter, row.te) if name}
    return found | {row.stacked[0]: (row, row.stacked[1]) for row in rows if row.stacked}


@dataclass(frozen=True)
class WeightBlock:
    """The part `tensor[place]` of a checkpoint's global tensor, and the tensors it is made of.

    Checkpoints stack layers, and a layer's experts: `place` is (), (layer,) or (layer, expert).
    Layers unlike each other are not stacked, but numbered in the key: () or (expert,).
    """

    key: str  # the global tensor's name
    place: tuple[int, ...]
    sharding: Sharding
    hf_names: list[str]
    stack: tuple[int, ...]  # how many of them are stacked: `place` is one of these


def weight_blocks(hf: HfConfig, names: str = "native") -> Iterator[WeightBlock]:
    """Yield every weight that a config implies, without a model, in the order of the network.

    `names` is `native` or `te`: TransformerEngine keeps the norm before a linear inside it.
    """
    sizes = {"layer": hf.num_hidden_layers, "expert": hf.num_experts}
    for row, numbers in rows_in_order(hf):
        name = row.te if names == "te" and row.te else row.parameter
        stacked = [x for x in numbers if x != "layer" or not hf.first_k_dense_replace]
        key = name.replace(".{layer}", "" if "layer" in stacked else f".{numbers.get('layer')}")
        if row.is_of_expert:
            key = key.replace("{expert}", "").replace(".mlp.experts.", ".mlp.experts.experts.")
        hf_names = [tensor.name.format(**numbers) for tensor in row.tensors]
        place, stack = (tuple(of[x] for x in stacked) for of in (numbers, sizes))
        yield WeightBlock(key, place, SHARDINGS[row.cut], hf_names, stack)
