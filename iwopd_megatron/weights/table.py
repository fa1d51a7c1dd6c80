"""The weight table: one row per kind of tensor, read both ways (Hugging Face <-> Megatron shard).

A row names a Megatron parameter, how its tensor-parallel shard is cut, and the Hugging Face tensors
it is made of. TransformerEngine's and the torch-native module names are both listed. Another model
family needs other rows.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from iwopd_megatron.hf.config import HfConfig
from iwopd_megatron.weights.sharding import (
    COLUMNS,
    GATED,
    GROUPED_DOWN,
    GROUPED_GATED,
    QKV,
    REPLICATED,
    ROWS,
    Sharding,
)

if TYPE_CHECKING:
    from iwopd_megatron.runtime.megatron import GPTModel

_LAYER = r"decoder\.layers\.(?P<layer>\d+)\."
_QKV = [f"model.layers.{{layer}}.self_attn.{x}_proj.weight" for x in "qkv"]
_GATE_UP = ["model.layers.{layer}.mlp.gate_proj.weight", "model.layers.{layer}.mlp.up_proj.weight"]
_EXPERT = "model.layers.{layer}.mlp.experts.{expert}."
_EXPERT_GATE_UP = [_EXPERT + "gate_proj.weight", _EXPERT + "up_proj.weight"]
_EXPERT_DOWN = [_EXPERT + "down_proj.weight"]

# (Megatron parameter, sharding, Hugging Face tensors). {expert} is filled from the (?P<expert>)
# group, or repeated over the local experts where one parameter holds them all.
WEIGHT_TABLE: list[tuple[str, Sharding, list[str]]] = [
    (r"embedding\.word_embeddings\.weight", ROWS, ["model.embed_tokens.weight"]),
    (r"output_layer\.weight", ROWS, ["lm_head.weight"]),
    (r"decoder\.final_layernorm\.weight", REPLICATED, ["model.norm.weight"]),
    (_LAYER + r"(input_layernorm\.weight|self_attention\.linear_qkv\.layer_norm_weight)",
     REPLICATED, ["model.layers.{layer}.input_layernorm.weight"]),
    (_LAYER + r"self_attention\.linear_qkv\.weight", QKV, _QKV),
    (_LAYER + r"self_attention\.q_layernorm\.weight", REPLICATED,
     ["model.layers.{layer}.self_attn.q_norm.weight"]),
    (_LAYER + r"self_attention\.k_layernorm\.weight", REPLICATED,
     ["model.layers.{layer}.self_attn.k_norm.weight"]),
    (_LAYER + r"self_attention\.linear_proj\.weight", COLUMNS,
     ["model.layers.{layer}.self_attn.o_proj.weight"]),
    (_LAYER + r"(pre_mlp_layernorm\.weight|mlp\.linear_fc1\.layer_norm_weight)", REPLICATED,
     ["model.layers.{layer}.post_attention_layernorm.weight"]),
    (_LAYER + r"mlp\.linear_fc1\.weight", GATED, _GATE_UP),
    (_LAYER + r"mlp\.linear_fc2\.weight", COLUMNS, ["model.layers.{layer}.mlp.down_proj.weight"]),
    (_LAYER + r"mlp\.router\.weight", REPLICATED, ["model.layers.{layer}.mlp.gate.weight"]),
    (_LAYER + r"mlp\.experts\.weight1", GROUPED_GATED, _EXPERT_GATE_UP),
    (_LAYER + r"mlp\.experts\.weight2", GROUPED_DOWN, _EXPERT_DOWN),
    (_LAYER + r"mlp\.experts\.linear_fc1\.weight(?P<expert>\d+)", GATED, _EXPERT_GATE_UP),
    (_LAYER + r"mlp\.experts\.linear_fc2\.weight(?P<expert>\d+)", COLUMNS, _EXPERT_DOWN),
]  # fmt: skip


@dataclass(frozen=True)
class MappedParameter:
    """One parameter of this rank and the whole Hugging Face tensors it is cut from."""

    name: str
    parameter: torch.Tensor
    sharding: Sharding
    hf_names: list[str]
    is_expert: bool
    is_copy: bool  # the last pipeline stage's copy of a tied embedding


def mapped_parameters(chunk: GPTModel, hf: HfConfig) -> Iterator[MappedParameter]:
    """Yield every parameter of one model chunk, in its own order; KeyError if no row matches it."""
    for name, parameter in chunk.named_parameters():
        sharding, templates, match = _find_row(name)
        groups = match.groupdict()
        experts = [0]
        if "layer" in groups:
            layer = chunk.decoder.layers[int(groups["layer"])]
            groups["layer"] = layer.layer_number - 1
            if ".experts." in name:
                local = layer.mlp.local_expert_indices
                experts = [local[int(groups["expert"])]] if groups.get("expert") else local
        is_copy = hf.tie_word_embeddings and name == "output_layer.weight"
        if is_copy:
            templates = ["model.embed_tokens.weight"]
        hf_names = [t.format(**{**groups, "expert": e}) for e in experts for t in templates]
        yield MappedParameter(name, parameter, sharding, hf_names, ".experts." in name, is_copy)


def _find_row(name: str) -> tuple[Sharding, list[str], re.Match]:
    for pattern, sharding, templates in WEIGHT_TABLE:
        match = re.fullmatch(pattern, name)
        if match:
            return sharding, templates, match
    raise KeyError(f"WEIGHT_TABLE has no row for Megatron parameter {name}")


@dataclass(frozen=True)
class WeightBlock:
    """The part `tensor[place]` of a checkpoint's global tensor, and the tensors it is made of.

    Checkpoints stack layers, and a layer's experts: `place` is (), (layer,) or (layer, expert).
    """

    key: str  # the global tensor's name
    place: tuple[int, ...]
    sharding: Sharding
    hf_names: list[str]


_ATTENTION = ["linear_qkv", "q_layernorm", "k_layernorm", "linear_proj"]
_MLP = ["linear_fc1", "linear_fc2"]


def weight_blocks(hf: HfConfig, names: str = "native") -> Iterator[WeightBlock]:
    """Yield every weight that a config implies, without a model, in the order of the network.

    `names` is `native` or `te`: TransformerEngine keeps the norm before a linear inside it.
    """
    yield _block("embedding.word_embeddings.weight", (), hf)
    before_qkv, before_mlp = "input_layernorm.weight", "pre_mlp_layernorm.weight"
    if names == "te":
        before_qkv = "self_attention.linear_qkv.layer_norm_weight"
        before_mlp = before_mlp if hf.num_experts else "mlp.linear_fc1.layer_norm_weight"
    attention = [f"self_attention.{x}.weight" for x in _ATTENTION]
    mlp = ["mlp.router.weight"] if hf.num_experts else [f"mlp.{x}.weight" for x in _MLP]
    for layer in range(hf.num_hidden_layers):
        for name in (before_qkv, *attention, before_mlp, *mlp):
            yield _block(f"decoder.layers.{layer}.{name}", (layer,), hf)
        for expert in range(hf.num_experts):
            for x in _MLP:
                name = f"decoder.layers.{layer}.mlp.experts.{x}.weight{expert}"
                yield _block(name, (layer, expert), hf)
    yield _block("decoder.final_layernorm.weight", (), hf)
    if not hf.tie_word_embeddings:
        yield _block("output_layer.weight", (), hf)


def _block(name: str, place: tuple[int, ...], hf: HfConfig) -> WeightBlock:
    sharding, templates, match = _find_row(name)
    key = re.sub(r"^decoder\.layers\.\d+", "decoder.layers", name)
    if len(place) == 2:
        key = re.sub(r"\d+$", "", key).replace(".mlp.experts.", ".mlp.experts.experts.")
    return WeightBlock(key, place, sharding, [t.format(**match.groupdict()) for t in templates])
