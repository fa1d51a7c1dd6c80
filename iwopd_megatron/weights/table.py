"""THE weight table: one row per kind of tensor, read both ways (Hugging Face <-> Megatron shard).

A row names a Megatron parameter, how its tensor-parallel shard is cut, and the Hugging Face tensors
it is made of. TransformerEngine and torch-native module names are both listed. Another model family
is another `TABLE`. Shapes: D hidden, F ffn, H heads x head size, E local experts.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from iwopd_megatron.hf.config import HfConfig

Tensor = torch.Tensor
# shard(sources, rank, size, hf): sources are tensors or lazy safetensors slices, only sliced
Shard = Callable[[list[Any], int, int, HfConfig], Tensor]
Unshard = Callable[[list[Tensor], HfConfig], list[Tensor]]


@dataclass(frozen=True)
class Cut:
    """How whole Hugging Face tensors become one shard, and shards become whole tensors again."""

    shard: Shard
    unshard: Unshard
    is_stack: bool = True  # the whole (rank 0 of 1) is its sources' rows, one after the other


def _rows(source: Any, rank: int, size: int) -> Tensor:
    step = _shape(source)[0] // size
    return source[rank * step : (rank + 1) * step]


def _shape(source: Any) -> list[int]:
    return list(source.shape) if isinstance(source, Tensor) else source.get_shape()


def _shard_columns(sources: list[Any], rank: int, size: int, hf: HfConfig) -> Tensor:
    step = _shape(sources[0])[1] // size
    return sources[0][:, rank * step : (rank + 1) * step]


def _shard_qkv(sources: list[Any], rank: int, size: int, hf: HfConfig) -> Tensor:
    """Megatron keeps q, k, v of one key-value group together: [q..q k v] per group."""
    groups, head = hf.num_key_value_heads // size, hf.head_dim
    parts = [_rows(source, rank, size) for source in sources]
    return torch.cat([part.reshape(groups, -1, head, part.shape[1]) for part in parts], 1).flatten(
        0, 2
    )


def _unshard_qkv(parts: list[Tensor], hf: HfConfig) -> list[Tensor]:
    # one part needs no copy
    whole = torch.cat(parts) if len(parts) > 1 else parts[0]
    whole = whole.unflatten(0, (hf.num_key_value_heads, -1, hf.head_dim))
    queries = whole.shape[1] - 2
    return [x.flatten(0, 2) for x in whole.split([queries, 1, 1], 1)]


def _shard_gated(sources: list[Any], rank: int, size: int, hf: HfConfig) -> Tensor:
    return torch.cat([_rows(source, rank, size) for source in sources])


def _unshard_gated(parts: list[Tensor], hf: HfConfig) -> list[Tensor]:
    return [torch.cat(halves) for halves in zip(*(part.chunk(2) for part in parts), strict=True)]


def _shard_grouped_gated(sources: list[Any], rank: int, size: int, hf: HfConfig) -> Tensor:
    """[gate, up] of every local expert -> [E, D, 2F / size] stored as [D, E * 2F / size]."""
    experts = [_shard_gated(sources[i : i + 2], rank, size, hf) for i in range(0, len(sources), 2)]
    return torch.stack(experts).transpose(1, 2).reshape(experts[0].shape[1], -1)


def _unshard_grouped_gated(parts: list[Tensor], hf: HfConfig) -> list[Tensor]:
    width = 2 * hf.moe_intermediate_size // len(parts)
    experts = [
        part.reshape(-1, part.shape[0], width).transpose(1, 2) for part in parts
    ]  # [E, width, D]
    return [x for shards in zip(*experts, strict=True) for x in _unshard_gated(list(shards), hf)]


def _shard_grouped_down(sources: list[Any], rank: int, size: int, hf: HfConfig) -> Tensor:
    """[D, F] of every local expert -> [E, F / size, D] stored as [E * F / size, D]."""
    return torch.cat([_shard_columns([source], rank, size, hf).t() for source in sources])


def _unshard_grouped_down(parts: list[Tensor], hf: HfConfig) -> list[Tensor]:
    width = hf.moe_intermediate_size // len(parts)
    experts = zip(*(part.split(width) for part in parts), strict=True)
    return [torch.cat(shards).t() for shards in experts]


REPLICATED = Cut(lambda sources, rank, size, hf: sources[0][:], lambda parts, hf: [parts[0]])
ROWS = Cut(
    lambda sources, rank, size, hf: _rows(sources[0], rank, size),
    lambda parts, hf: [torch.cat(parts)],
)
COLUMNS = Cut(_shard_columns, lambda parts, hf: [torch.cat(parts, 1)])
QKV = Cut(_shard_qkv, _unshard_qkv, is_stack=False)
GATED = Cut(_shard_gated, _unshard_gated)
GROUPED_GATED = Cut(_shard_grouped_gated, _unshard_grouped_gated, is_stack=False)
GROUPED_DOWN = Cut(_shard_grouped_down, _unshard_grouped_down, is_stack=False)

_LAYER = r"decoder\.layers\.(?P<layer>\d+)\."
_QKV = [f"model.layers.{{layer}}.self_attn.{x}_proj.weight" for x in "qkv"]
_GATE_UP = ["model.layers.{layer}.mlp.gate_proj.weight", "model.layers.{layer}.mlp.up_proj.weight"]
_EXPERT = "model.layers.{layer}.mlp.experts.{expert}."
_EXPERT_GATE_UP = [_EXPERT + "gate_proj.weight", _EXPERT + "up_proj.weight"]
_EXPERT_DOWN = [_EXPERT + "down_proj.weight"]

# (Megatron parameter, cut, Hugging Face tensors). {expert} is filled from the (?P<expert>) group,
# or repeated over the local experts where one parameter holds them all.
TABLE: list[tuple[str, Cut, list[str]]] = [
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
class Entry:
    """One parameter of this rank and the whole Hugging Face tensors it is cut from."""

    name: str
    parameter: Tensor
    cut: Cut
    hf_names: list[str]
    is_expert: bool
    is_copy: bool  # the last pipeline stage's copy of a tied embedding


def entries(chunk: torch.nn.Module, hf: HfConfig) -> Iterator[Entry]:
    """Every parameter of one model chunk, in its own order; KeyError where no row matches one."""
    tied = hf.tie_word_embeddings
    for name, parameter in chunk.named_parameters():
        cut, templates, match = _find_row(name)
        groups = match.groupdict()
        experts = [0]
        if "layer" in groups:
            layer = chunk.decoder.layers[int(groups["layer"])]
            groups["layer"] = layer.layer_number - 1
            if ".experts." in name:
                local = layer.mlp.local_expert_indices
                experts = [local[int(groups["expert"])]] if groups.get("expert") else local
        is_copy = tied and name == "output_layer.weight"
        if is_copy:
            templates = ["model.embed_tokens.weight"]
        hf_names = [t.format(**{**groups, "expert": e}) for e in experts for t in templates]
        yield Entry(name, parameter, cut, hf_names, ".experts." in name, is_copy)


def _find_row(name: str) -> tuple[Cut, list[str], re.Match]:
    for pattern, cut, templates in TABLE:
        match = re.fullmatch(pattern, name)
        if match:
            return cut, templates, match
    raise KeyError(f"mapping.TABLE has no row for Megatron parameter {name}")


@dataclass(frozen=True)
class Block:
    """One slice `tensor[place]` of a checkpoint's global tensor and the tensors it is made of.

    Checkpoints stack layers, and a layer's experts: `place` is (), (layer,) or (layer, expert).
    """

    key: str
    place: tuple[int, ...]
    cut: Cut
    hf_names: list[str]


def blocks(hf: HfConfig, names: str = "native") -> Iterator[Block]:
    """Every weight of a config without a model, in the order of the network.

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


_ATTENTION = ["linear_qkv", "q_layernorm", "k_layernorm", "linear_proj"]
_MLP = ["linear_fc1", "linear_fc2"]


def _block(name: str, place: tuple[int, ...], hf: HfConfig) -> Block:
    cut, templates, match = _find_row(name)
    key = re.sub(r"^decoder\.layers\.\d+", "decoder.layers", name)
    if len(place) == 2:
        key = re.sub(r"\d+$", "", key).replace(".mlp.experts.", ".mlp.experts.experts.")
    return Block(key, place, cut, [t.format(**match.groupdict()) for t in templates])
