"""Every tensor of a Hugging Face folder and its shape, from the model's description. No torch."""

from __future__ import annotations

from collections.abc import Iterator

from iwopd_megatron.hf.config import HfConfig

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm")
_NORMS = ("input_layernorm", "post_attention_layernorm")
_MLP = ("gate_proj", "up_proj", "down_proj")


def hf_names(hf: HfConfig) -> Iterator[str]:
    """Yield the names of the tensors that config.json implies; a tied head is not one."""
    yield EMBEDDING
    for layer in range(hf.num_hidden_layers):
        parts = [f"self_attn.{x}" for x in _ATTENTION] + list(_NORMS)
        if hf.num_experts:
            parts.append("mlp.gate")
            parts += [f"mlp.experts.{e}.{x}" for e in range(hf.num_experts) for x in _MLP]
        else:
            parts += [f"mlp.{x}" for x in _MLP]
        yield from (f"model.layers.{layer}.{part}.weight" for part in parts)
    yield "model.norm.weight"
    if not hf.tie_word_embeddings:
        yield HEAD


def hf_shape(name: str, hf: HfConfig) -> tuple[int, ...]:
    """Return the shape that config.json implies for a Hugging Face tensor."""
    hidden, head = hf.hidden_size, hf.head_dim
    queries, keys = hf.num_attention_heads * head, hf.num_key_value_heads * head
    ffn = hf.moe_intermediate_size if ".experts." in name else hf.intermediate_size
    shapes = {
        "embed_tokens": (hf.vocab_size, hidden),
        "lm_head": (hf.vocab_size, hidden),
        "q_proj": (queries, hidden),
        "k_proj": (keys, hidden),
        "v_proj": (keys, hidden),
        "o_proj": (hidden, queries),
        "q_norm": (head,),
        "k_norm": (head,),
        "gate": (hf.num_experts, hidden),
        "gate_proj": (ffn, hidden),
        "up_proj": (ffn, hidden),
        "down_proj": (hidden, ffn),
    }
    return shapes.get(name.split(".")[-2], (hidden,))
