"""The weights that `Decoder` multiplies by: its own, or the trainer's where they lie.

Its own are in Hugging Face's order, query, key and value rows together, to be filled by name. A
process that holds every parameter whole has them in Megatron's order: the engine reads those, and
an optimiser step changes what it reads. Shapes: D hidden, H query heads, G key-value heads, d head
size, E experts, F ffn, S the shared expert's, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch

from iwopd_megatron.hf.config import HfConfig

New = Callable[..., torch.Tensor]  # sizes -> zeros


class Layer(NamedTuple):
    """One layer's weights. Dense: one expert and no router."""

    attention_norm: torch.Tensor  # [D]
    qkv: torch.Tensor  # [(H + 2 G) d, D]
    qkv_bias: torch.Tensor | None  # [(H + 2 G) d]
    qk_norm: tuple[torch.Tensor, torch.Tensor] | None  # [d] each
    out: torch.Tensor  # [D, H d]
    ffn_norm: torch.Tensor  # [D]
    router: torch.Tensor | None  # [E, D]; None in a layer without experts
    gate_up: torch.Tensor  # [E, D, 2 F]
    down: torch.Tensor  # [E, F, D]
    shared_gate_up: torch.Tensor | None = None  # [2 S, D], of the expert that every token meets
    shared_down: torch.Tensor | None = None  # [D, S]
    shared_gate: torch.Tensor | None = None  # [1, D], whose sigmoid scales its output
    score_bias: torch.Tensor | None = None  # [E] fp32, which helps to choose


class DecoderWeights(NamedTuple):
    """A whole model's weights."""

    embedding: torch.Tensor  # [V, D]
    norm: torch.Tensor  # [D]
    head: torch.Tensor  # [V, D], the embedding where tied
    layers: list[Layer]
    is_grouped: bool  # qkv rows by group, as Megatron has them: q..q k v of a key-value head


def own_weights(hf: HfConfig, new: New) -> tuple[DecoderWeights, dict[str, torch.Tensor]]:
    """Return zero weights, and every tensor of them by its Hugging Face name, to fill."""
    hidden, tied = hf.hidden_size, hf.tie_word_embeddings
    embedding, norm = new(hf.vocab_size, hidden), new(hidden)
    head = embedding if tied else new(hf.vocab_size, hidden)
    named = {"model.embed_tokens.weight": embedding, "model.norm.weight": norm}
    if not tied:
        named["lm_head.weight"] = head
    layers = []
    for i in range(hf.num_hidden_layers):
        layer, own = _own_layer(hf, new, i)
        layers.append(layer)
        named |= {f"model.layers.{i}.{name}": tensor for name, tensor in own.items()}
    return DecoderWeights(embedding, norm, head, layers, is_grouped=False), named


def _own_layer(hf: HfConfig, new: New, i: int) -> tuple[Layer, dict[str, torch.Tensor]]:
    hidden, head, experts, ffn = hf.hidden_size, hf.head_dim, hf.num_experts, hf.ffn_size
    heads, groups = hf.num_attention_heads, hf.num_key_value_heads
    shared, gates = hf.shared_expert_intermediate_size, hf.shared_expert_gates
    if not hf.has_experts(i):
        experts, shared, gates, ffn = 0, 0, 0, hf.intermediate_size
    layer = Layer(
        attention_norm=new(hidden),
        qkv=new((heads + 2 * groups) * head, hidden),
        qkv_bias=new((heads + 2 * groups) * head) if hf.qkv_bias else None,
        qk_norm=(new(head), new(head)) if hf.qk_norm else None,
        out=new(hidden, heads * head),
        ffn_norm=new(hidden),
        router=new(experts, hidden) if experts else None,
        gate_up=new(experts or 1, hidden, 2 * ffn),
        down=new(experts or 1, ffn, hidden),
        shared_gate_up=new(2 * shared, hidden) if shared else None,
        shared_down=new(hidden, shared) if shared else None,
        shared_gate=new(gates, hidden) if gates else None,
        score_bias=new(experts).float() if experts and hf.sigmoid_router else None,
    )
    rows = [heads * head, groups * head, groups * head]
    own = {"o_proj.weight": layer.out}
    for kind, whole in (("weight", layer.qkv), ("bias", layer.qkv_bias)):
        if whole is not None:
            own |= {
                f"{x}_proj.{kind}": part for x, part in zip("qkv", whole.split(rows), strict=True)
            }
    if layer.qk_norm is not None:
        own |= {f"{x}_norm.weight": part for x, part in zip("qk", layer.qk_norm, strict=True)}
    own = {f"self_attn.{name}": tensor for name, tensor in own.items()}
    own["input_layernorm.weight"] = layer.attention_norm
    own["post_attention_layernorm.weight"] = layer.ffn_norm
    if layer.router is not None:
        own["mlp.gate.weight"] = layer.router
    if layer.score_bias is not None:
        own["mlp.gate.e_score_correction_bias"] = layer.score_bias
    for e, (gate_up, down) in enumerate(zip(layer.gate_up.mT, layer.down.mT, strict=True)):
        prefix = f"mlp.experts.{e}." if experts else "mlp."
        own |= _mlp(prefix, gate_up, down)
    if layer.shared_gate_up is not None and layer.shared_down is not None:
        module = "mlp.shared_experts." if hf.sigmoid_router else "mlp.shared_expert."
        own |= _mlp(module, layer.shared_gate_up, layer.shared_down)
    if layer.shared_gate is not None:
        own["mlp.shared_expert_gate.weight"] = layer.shared_gate
    return layer, own


def _mlp(prefix: str, gate_up: torch.Tensor, down: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return an MLP's tensors by name, of gate and up together `[2 F, D]` and down `[D, F]`."""
    gate, up = gate_up.chunk(2)
    parts = {"gate": gate, "up": up, "down": down}
    return {f"{prefix}{name}_proj.weight": part for name, part in parts.items()}


def viewed_weights(hf: HfConfig, parameters: Mapping[str, torch.Tensor]) -> DecoderWeights:
    """Return the torch-native model's parameters, whole and by Megatron's names, as weights.

    Nothing is copied: a change of the parameters is a change of these.
    """
    embedding = parameters["embedding.word_embeddings.weight"]
    head = embedding if hf.tie_word_embeddings else parameters["output_layer.weight"]
    layers = [_viewed_layer(hf, i, parameters) for i in range(hf.num_hidden_layers)]
    norm = parameters["decoder.final_layernorm.weight"]
    return DecoderWeights(embedding, norm, head, layers, is_grouped=True)


def _viewed_layer(hf: HfConfig, i: int, parameters: Mapping[str, torch.Tensor]) -> Layer:
    def own(name: str) -> torch.Tensor:
        return parameters[f"decoder.layers.{i}.{name}"]

    experts, hidden = hf.num_experts * hf.has_experts(i), hf.hidden_size
    shared = experts and hf.shared_expert_intermediate_size
    if experts:  # as GroupedExperts (models/experts.py) reads its two parameters
        gate_up = own("mlp.experts.weight1").view(experts, hidden, -1)
        down = own("mlp.experts.weight2").view(experts, -1, hidden)
    else:
        gate_up = own("mlp.linear_fc1.weight").t()[None]
        down = own("mlp.linear_fc2.weight").t()[None]
    return Layer(
        attention_norm=own("input_layernorm.weight"),
        qkv=own("self_attention.linear_qkv.weight"),
        qkv_bias=own("self_attention.linear_qkv.bias") if hf.qkv_bias else None,
        qk_norm=(
            own("self_attention.q_layernorm.weight"),
            own("self_attention.k_layernorm.weight"),
        )
        if hf.qk_norm
        else None,
        out=own("self_attention.linear_proj.weight"),
        ffn_norm=own("pre_mlp_layernorm.weight"),
        router=own("mlp.router.weight") if experts else None,
        gate_up=gate_up,
        down=down,
        shared_gate_up=own("mlp.shared_experts.linear_fc1.weight") if shared else None,
        shared_down=own("mlp.shared_experts.linear_fc2.weight") if shared else None,
        shared_gate=own("mlp.shared_experts.gate_weight")
        if shared and hf.shared_expert_gates
        else None,
        score_bias=own("mlp.router.expert_bias") if experts and hf.sigmoid_router else None,
    )
