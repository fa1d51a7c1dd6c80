"""Megatron's settings of routers and experts, from the model's description."""

from __future__ import annotations

from typing import Any

import torch

from iwopd_megatron.hf.config import HfConfig
from iwopd_megatron.models import layer_specs


def expert_settings(hf: HfConfig, dtype: torch.dtype) -> dict[str, Any]:
    """Return what a model with experts needs; nothing for a dense one."""
    if not hf.num_experts:
        return {}
    return dict(
        num_moe_experts=hf.num_experts,
        moe_ffn_hidden_size=hf.moe_intermediate_size,
        moe_router_topk=hf.num_experts_per_tok,
        moe_router_pre_softmax=not hf.norm_topk_prob,
        moe_router_score_function="sigmoid" if hf.sigmoid_router else "softmax",
        moe_router_dtype="fp32",
        moe_router_load_balancing_type="none",
        moe_aux_loss_coeff=0.0,
        moe_token_dispatcher_type="alltoall",
        moe_shared_expert_intermediate_size=hf.shared_expert_intermediate_size or None,
        moe_shared_expert_gate=hf.shared_expert_gates > 0,
        moe_grouped_gemm=layer_specs.has_transformer_engine(dtype),
    ) | _router_settings(hf)


def _router_settings(hf: HfConfig) -> dict[str, Any]:
    """Return what routers with sigmoid scores need, and models whose first layers are dense."""
    found: dict[str, Any] = {}
    if hf.sigmoid_router:
        found |= dict(
            moe_router_enable_expert_bias=True,
            moe_router_bias_update_rate=0.0,
            moe_router_topk_scaling_factor=hf.routed_scaling_factor,
        )
    if hf.n_group > 1:
        found |= dict(moe_router_num_groups=hf.n_group, moe_router_group_topk=hf.topk_group)
    if hf.first_k_dense_replace:
        layers = range(hf.num_hidden_layers)
        found["moe_layer_freq"] = [int(hf.has_experts(layer)) for layer in layers]
    return found
