"""Arithmetic of a forward pass, from config.json alone. Multiply-adds; a backward pass is twice it.

Per token the matrix products with the active weights; per sequence of L tokens the causal
attention, 2 products of L^2 / 2 pairs x heads x head size a layer. Imports no torch.
"""

from __future__ import annotations

from iwopd_megatron.hf.config import HfConfig


def token_products(hf: HfConfig) -> int:
    """Return the multiply-adds of a token with the layers' active weights, no embedding or head."""
    hidden = hf.hidden_size
    attention = hidden * (2 * hf.queries + 2 * hf.keys)
    dense = 3 * hidden * hf.intermediate_size
    if not hf.num_experts:
        return hf.num_hidden_layers * (attention + dense)
    ffn = 3 * hidden * hf.moe_intermediate_size * hf.num_experts_per_tok
    ffn += hidden * hf.num_experts  # router
    ffn += hidden * (3 * hf.shared_expert_intermediate_size + hf.shared_expert_gates)
    sparse = hf.num_hidden_layers - hf.first_k_dense_replace
    return hf.num_hidden_layers * attention + hf.first_k_dense_replace * dense + sparse * ffn


def attention_products(hf: HfConfig, length: int) -> int:
    """Return the multiply-adds of causal attention over one sequence of `length` tokens."""
    return hf.num_hidden_layers * hf.num_attention_heads * hf.head_dim * length**2


def attention_cost(hf: HfConfig) -> float:
    """Return a of a sequence's cost L + a * L^2 in tokens: at L = 1 / a attention is half of it."""
    return attention_products(hf, 1) / token_products(hf)
