"""Rows of the weight table: one Megatron parameter, and the Hugging Face tensors it is made of.

A row is data. Names have {layer} and {expert} where a number stands; sizes are names of fields and
properties of `HfConfig`; `cut` names how a tensor-parallel shard is cut (weights/sharding.py). The
rows here are those that several families have; a family adds its own.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

_LAYER = "decoder.layers.{layer}."
_HF = "model.layers.{layer}."


@dataclass(frozen=True)
class HfTensor:
    """A tensor of a Hugging Face folder: its name and the names of its sizes."""

    name: str
    sizes: tuple[str, ...]


@dataclass(frozen=True)
class Row:
    """A Megatron parameter, how it is cut, and what it is made of, in this order.

    A model whose `HfConfig` says no to the field that `needs` names does not have it.
    """

    parameter: str
    cut: str
    tensors: tuple[HfTensor, ...]
    needs: str = ""
    layers: str = ""  # "dense" or "experts": only such layers have one
    te: str = ""  # TransformerEngine's name, where it is another
    stacked: tuple[str, str] | None = None  # of all local experts: the native parameter and its cut

    @property
    def is_of_layer(self) -> bool:
        """Whether every layer has one."""
        return "{layer}" in self.parameter

    @property
    def is_of_expert(self) -> bool:
        """Whether every expert has one."""
        return "{expert}" in self.parameter


def only_in(layers: str, *rows: Row) -> tuple[Row, ...]:
    """Return rows that only layers of one kind have, "dense" or "experts"."""
    return tuple(replace(row, layers=layers) for row in rows)


def projections(module: str, names: str, *sizes: tuple[str, ...]) -> tuple[HfTensor, ...]:
    """Return `<module>.<name>_proj.weight` of a layer, each with its sizes."""
    return tuple(
        HfTensor(f"{_HF}{module}.{name}_proj.weight", own)
        for name, own in zip(names.split(), sizes, strict=True)
    )


def norm(
    parameter: str, name: str, size: str = "hidden_size", te: str = "", needs: str = ""
) -> Row:
    """Return the row of a layer's norm."""
    tensor = HfTensor(f"{_HF}{name}.weight", (size,))
    te = _LAYER + te if te else ""
    return Row(f"{_LAYER}{parameter}.weight", "REPLICATED", (tensor,), needs, te=te)


_WIDE, _NARROW = ("intermediate_size", "hidden_size"), ("hidden_size", "intermediate_size")
_EXPERT_WIDE = ("moe_intermediate_size", "hidden_size")
_EXPERT_NARROW = ("hidden_size", "moe_intermediate_size")
_QKV = ("queries", "keys", "keys")

EMBEDDING = Row(
    "embedding.word_embeddings.weight",
    "ROWS",
    (HfTensor("model.embed_tokens.weight", ("vocab_size", "hidden_size")),),
)
ATTENTION_NORM = norm(
    "input_layernorm", "input_layernorm", te="self_attention.linear_qkv.layer_norm_weight"
)
ATTENTION_NORM_APART = norm("input_layernorm", "input_layernorm")
QKV = Row(
    _LAYER + "self_attention.linear_qkv.weight",
    "QKV",
    projections("self_attn", "q k v", *((size, "hidden_size") for size in _QKV)),
)
QKV_BIAS = Row(
    _LAYER + "self_attention.linear_qkv.bias",
    "QKV",
    tuple(
        HfTensor(f"{_HF}self_attn.{x}_proj.bias", (size,))
        for x, size in zip("qkv", _QKV, strict=True)
    ),
    needs="qkv_bias",
)
QK_NORMS = (
    norm("self_attention.q_layernorm", "self_attn.q_norm", "head_dim", needs="qk_norm"),
    norm("self_attention.k_layernorm", "self_attn.k_norm", "head_dim", needs="qk_norm"),
)


def latent_attention() -> tuple[Row, ...]:
    """Return the rows of multi-head latent attention, with a latent of queries or without.

    Both down projections follow each other, as servers fuse them (weights/sync.py).
    """

    def row(name: str, cut: str, tensor: str, *sizes: str, needs: str = "") -> Row:
        own = HfTensor(f"{_HF}self_attn.{tensor}.weight", sizes)
        return Row(f"{_LAYER}self_attention.{name}.weight", cut, (own,), needs)

    q, plain = "q_lora_rank", "has_plain_queries"
    return (
        row("linear_q_proj", "ROWS", "q_proj", "queries", "hidden_size", needs=plain),
        row("linear_q_down_proj", "REPLICATED", "q_a_proj", q, "hidden_size", needs=q),
        row("linear_kv_down_proj", "REPLICATED", "kv_a_proj_with_mqa", "kv_down", "hidden_size"),
        row("q_layernorm", "REPLICATED", "q_a_layernorm", q, needs=q),
        row("linear_q_up_proj", "ROWS", "q_b_proj", "queries", q, needs=q),
        row("kv_layernorm", "REPLICATED", "kv_a_layernorm", "kv_lora_rank"),
        row("linear_kv_up_proj", "ROWS", "kv_b_proj", "kv_up", "kv_lora_rank"),
        row("linear_proj", "COLUMNS", "o_proj", "hidden_size", "values"),
    )


ATTENTION_OUT = Row(
    _LAYER + "self_attention.linear_proj.weight",
    "COLUMNS",
    projections("self_attn", "o", ("hidden_size", "queries")),
)
DENSE_NORM = norm(
    "pre_mlp_layernorm", "post_attention_layernorm", te="mlp.linear_fc1.layer_norm_weight"
)
DENSE = (
    Row(
        _LAYER + "mlp.linear_fc1.weight",
        "GATED",
        projections("mlp", "gate up", _WIDE, _WIDE),
    ),
    Row(_LAYER + "mlp.linear_fc2.weight", "COLUMNS", projections("mlp", "down", _NARROW)),
)
_SHARED_WIDE = ("shared_expert_intermediate_size", "hidden_size")
EXPERTS_NORM = norm("pre_mlp_layernorm", "post_attention_layernorm")
ROUTER = Row(
    _LAYER + "mlp.router.weight",
    "REPLICATED",
    (HfTensor(_HF + "mlp.gate.weight", ("num_experts", "hidden_size")),),
)
# A buffer, not a parameter: it is added to the scores that choose experts, and never trained.
SCORE_BIAS = Row(
    _LAYER + "mlp.router.expert_bias",
    "REPLICATED",
    (HfTensor(_HF + "mlp.gate.e_score_correction_bias", ("num_experts",)),),
)
EXPERTS = (
    Row(
        _LAYER + "mlp.experts.linear_fc1.weight{expert}",
        "GATED",
        projections("mlp.experts.{expert}", "gate up", _EXPERT_WIDE, _EXPERT_WIDE),
        stacked=(_LAYER + "mlp.experts.weight1", "GROUPED_GATED"),
    ),
    Row(
        _LAYER + "mlp.experts.linear_fc2.weight{expert}",
        "COLUMNS",
        projections("mlp.experts.{expert}", "down", _EXPERT_NARROW),
        stacked=(_LAYER + "mlp.experts.weight2", "GROUPED_DOWN"),
    ),
)


def shared_expert(module: str) -> tuple[Row, ...]:
    """Return the rows of the expert that every token meets, which Hugging Face calls `module`."""
    return (
        Row(
            _LAYER + "mlp.shared_experts.linear_fc1.weight",
            "GATED",
            projections(module, "gate up", _SHARED_WIDE, _SHARED_WIDE),
        ),
        Row(
            _LAYER + "mlp.shared_experts.linear_fc2.weight",
            "COLUMNS",
            projections(module, "down", _SHARED_WIDE[::-1]),
        ),
    )


SHARED_EXPERT_GATE = Row(
    _LAYER + "mlp.shared_experts.gate_weight",
    "REPLICATED",
    (HfTensor(_HF + "mlp.shared_expert_gate.weight", ("shared_expert_gates", "hidden_size")),),
)
FINAL_NORM = Row(
    "decoder.final_layernorm.weight",
    "REPLICATED",
    (HfTensor("model.norm.weight", ("hidden_size",)),),
)
HEAD = Row(
    "output_layer.weight",
    "ROWS",
    (HfTensor("lm_head.weight", ("vocab_size", "hidden_size")),),
    needs="has_head",
)


def decoder(*layer: Row) -> tuple[Row, ...]:
    """Return the rows of a whole model, in the order of the network, around those of a layer."""
    return (EMBEDDING, *layer, FINAL_NORM, HEAD)
