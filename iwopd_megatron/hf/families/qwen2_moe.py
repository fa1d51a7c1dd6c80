"""Qwen2-MoE: Qwen2's attention, experts behind a softmax router, and a gated shared expert."""

from __future__ import annotations

from typing import Any

from iwopd_megatron.files.typed_json import TypedJson
from iwopd_megatron.hf.families import llama, qwen3_moe, rows
from iwopd_megatron.hf.families.family import Family, head_dim_or_share
from iwopd_megatron.hf.families.published import DENSE, published


def _describe(config: TypedJson) -> dict[str, Any]:
    return {
        "num_key_value_heads": config.count("num_key_value_heads"),
        "head_dim": head_dim_or_share(config),
        "qkv_bias": config.flag("qkv_bias", True),
        "num_experts": config.count("num_experts"),
        "moe_intermediate_size": config.count("moe_intermediate_size"),
        "num_experts_per_tok": config.count("num_experts_per_tok"),
        "norm_topk_prob": config.flag("norm_topk_prob", False),
        "shared_expert_intermediate_size": config.count("shared_expert_intermediate_size"),
        "shared_expert_gates": 1,
    }


_COMMON = {
    "model_type": "qwen2_moe",
    "vocab_size": 151936,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "tie_word_embeddings": False,
    "norm_topk_prob": False,
    "torch_dtype": "bfloat16",
}
_SIZES = (
    *DENSE,
    "num_experts",
    "num_experts_per_tok",
    "moe_intermediate_size",
    "shared_expert_intermediate_size",
    "max_position_embeddings",
)
_SMALL = "Qwen1.5-MoE-A2.7B"
_LARGE = "Qwen2-57B-A14B"

QWEN2_MOE = Family(
    model_type="qwen2_moe",
    transformers="Qwen2Moe",
    describe=_describe,
    fixed=llama.FIXED | qwen3_moe.EVERY_LAYER | {"use_sliding_window": False},
    null_means_default=("mlp_only_layers",),
    rows=rows.decoder(
        rows.ATTENTION_NORM,
        rows.QKV,
        rows.QKV_BIAS,
        rows.ATTENTION_OUT,
        rows.EXPERTS_NORM,
        rows.ROUTER,
        *rows.shared_expert("mlp.shared_expert"),
        rows.SHARED_EXPERT_GATE,
        *rows.EXPERTS,
    ),
    sample=llama.SAMPLE
    | {
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 96,
        "norm_topk_prob": False,
    },
    published=published(
        _COMMON | qwen3_moe.EVERY_LAYER,
        {
            f"{_SMALL}, {_SMALL}-Chat": (2048, 5632, 24, 16, 16, 60, 4, 1408, 5632, 8192),
            _LARGE: (3584, 18944, 28, 28, 4, 64, 8, 2560, 20480, 131072),
            f"{_LARGE}-Instruct": (3584, 18944, 28, 28, 4, 64, 8, 2560, 20480, 32768),
        },
        _SIZES,
    ),
)
