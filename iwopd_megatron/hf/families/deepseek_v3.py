"""DeepSeek-V3 and R1, Kimi-K2, Moonlight: latent attention, and experts as GLM-4.5 has them.

Kimi-K2's config.json says `kimi_k2`, which is the same architecture. Layers of multi-token
prediction, numbered after the last, are read past as by transformers.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from iwopd_megatron.errors import RecipeError
from iwopd_megatron.files.typed_json import TypedJson
from iwopd_megatron.hf.families import glm4_moe, llama, rows
from iwopd_megatron.hf.families.family import Family
from iwopd_megatron.hf.families.published import published
from iwopd_megatron.hf.rope import read_rope, score_factor


def latent_attention(config: TypedJson) -> dict[str, Any]:
    """Return the fields of latent attention: every head has keys and values of its own."""
    content, heads = config.content, config.count("num_attention_heads")
    if content.get("num_key_value_heads", heads) not in (heads, None):
        raise RecipeError(
            f"{config.file}: num_key_value_heads={content['num_key_value_heads']!r} is not "
            f"supported with latent attention; only {heads}, as num_attention_heads, is."
        )
    rope = read_rope(content, config.count("max_position_embeddings"), config.file)
    interleaved = config.flag("rope_interleave", True)
    turned, latent = config.count("qk_rope_head_dim"), content.get("q_lora_rank", 0)
    return {
        "num_key_value_heads": heads,
        "head_dim": config.count("qk_nope_head_dim") + turned,
        "q_lora_rank": 0 if latent is None else config.count("q_lora_rank"),
        "kv_lora_rank": config.count("kv_lora_rank"),
        "qk_rope_head_dim": turned,
        "v_head_dim": config.count("v_head_dim"),
        "rope": replace(rope, interleaved=interleaved, score_factor=score_factor(content, rope)),
    }


def _describe(config: TypedJson) -> dict[str, Any]:
    """Return the fields; what transformers takes for a missing setting is none of these models'."""
    if config.content.get("first_k_dense_replace") != 0:
        config.count("first_k_dense_replace")
    for key in ("n_group", "topk_group", "n_shared_experts"):
        config.count(key)
    config.number("routed_scaling_factor")
    return (
        latent_attention(config)
        | glm4_moe.experts(config, "DeepseekV3")
        | {"first_k_dense_replace": glm4_moe.dense_layers(config)}
        | end_of_answers(config)
    )


def end_of_answers(config: TypedJson) -> dict[str, Any]:
    """Return the id that transformers takes where config.json names none."""
    return {} if "eos_token_id" in config.content else {"eos_token_ids": (1,)}


FIXED = glm4_moe.FIXED | {"attention_bias": False, "scoring_func": "sigmoid", "moe_layer_freq": 1}
SAMPLE = llama.SAMPLE | {
    "num_key_value_heads": 4,
    "q_lora_rank": 24,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "moe_intermediate_size": 32,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 2.5,
    "rope_parameters": {
        "rope_type": "yarn",
        "rope_theta": 1e4,
        "factor": 4.0,
        "original_max_position_embeddings": 64,
        "mscale": 1.0,
        "mscale_all_dim": 0.7,
    },
}
LAYERS = (rows.ATTENTION_NORM_APART, *rows.latent_attention(), *glm4_moe.MLPS)
_COMMON = {
    "model_type": "deepseek_v3",
    "tie_word_embeddings": False,
    "attention_bias": False,
    "norm_topk_prob": True,
    "scoring_func": "sigmoid",
    "moe_layer_freq": 1,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "torch_dtype": "bfloat16",
}
_YARN = {
    "type": "yarn",
    "factor": 40,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "original_max_position_embeddings": 4096,
}
_SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "n_routed_experts",
    "num_experts_per_tok",
    "moe_intermediate_size",
    "n_shared_experts",
    "first_k_dense_replace",
)
_NAMES = "DeepSeek-V3, DeepSeek-V3-0324, DeepSeek-V3.1, DeepSeek-R1, DeepSeek-R1-0528"

DEEPSEEK_V3 = Family(
    model_type="deepseek_v3",
    transformers="DeepseekV3",
    describe=_describe,
    fixed=FIXED,
    rows=rows.decoder(*LAYERS),
    predicts_ahead=True,
    also_called=("kimi_k2",),
    sample=SAMPLE,
    published=published(
        _COMMON
        | {
            "vocab_size": 129280,
            "rms_norm_eps": 1e-6,
            "rope_theta": 10000,
            "rope_scaling": _YARN,
            "max_position_embeddings": 163840,
            "routed_scaling_factor": 2.5,
            "n_group": 8,
            "topk_group": 4,
            "num_nextn_predict_layers": 1,
        },
        {_NAMES: (7168, 18432, 61, 128, 128, 256, 8, 2048, 1, 3)},
        _SIZES,
    )
    | published(
        _COMMON
        | {
            "vocab_size": 163840,
            "rms_norm_eps": 1e-6,
            "rope_theta": 50000.0,
            "rope_scaling": _YARN | {"factor": 32.0, "beta_fast": 1.0, "beta_slow": 1.0},
            "max_position_embeddings": 131072,
            "routed_scaling_factor": 2.827,
            "n_group": 1,
            "topk_group": 1,
        },
        {"Kimi-K2-Base, Kimi-K2-Instruct": (7168, 18432, 61, 64, 64, 384, 8, 2048, 1, 1)},
        _SIZES,
    )
    | published(
        _COMMON
        | {
            "vocab_size": 163840,
            "q_lora_rank": None,
            "rms_norm_eps": 1e-5,
            "rope_theta": 50000.0,
            "max_position_embeddings": 8192,
            "routed_scaling_factor": 2.446,
            "n_group": 1,
            "topk_group": 1,
        },
        {
            "Moonlight-16B-A3B, Moonlight-16B-A3B-Instruct": (
                2048,
                11264,
                27,
                16,
                16,
                64,
                6,
                1408,
                2,
                1,
            )
        },
        _SIZES,
    ),
)
