"""GLM-4.5 to 4.7: dense layers first, then experts behind sigmoid scores and one for every token.

A bias that is not trained helps to choose experts; half of each head is turned by rotary positions.
The layer of multi-token prediction, numbered after the last, is read past as by transformers.
"""

from __future__ import annotations

from typing import Any

from iwopd_megatron.errors import RecipeError
from iwopd_megatron.files.typed_json import TypedJson
from iwopd_megatron.hf.families import llama, rows
from iwopd_megatron.hf.families.family import Family, head_dim_or_share
from iwopd_megatron.hf.families.published import DENSE, published


def _describe(config: TypedJson) -> dict[str, Any]:
    return {
        "num_key_value_heads": config.count("num_key_value_heads"),
        "head_dim": head_dim_or_share(config),
        "qk_norm": config.flag("use_qk_norm", False),
        "qkv_bias": config.flag("attention_bias", False),
        "first_k_dense_replace": dense_layers(config),
    } | experts(config, "Glm4Moe")


def experts(config: TypedJson, name: str) -> dict[str, Any]:
    """Return the fields of experts and their routers; `name`: of transformers' classes.

    transformers 5's num_local_experts wins over n_routed_experts.
    """
    newer = config.content.get("num_local_experts") is not None
    width = config.count("moe_intermediate_size")
    found = {
        "num_experts": config.count("num_local_experts" if newer else "n_routed_experts"),
        "moe_intermediate_size": width,
        "num_experts_per_tok": config.count("num_experts_per_tok"),
        "norm_topk_prob": True,
        "shared_expert_intermediate_size": width * config.count("n_shared_experts", 1),
        "sigmoid_router": True,
        "routed_scaling_factor": config.number("routed_scaling_factor", 1.0),
        "n_group": config.count("n_group", 1),
        "topk_group": config.count("topk_group", 1),
    }
    _check_groups(config, found, name)
    return found


def dense_layers(config: TypedJson) -> int:
    """Return how many layers at the beginning are dense; the last has experts."""
    if config.content.get("first_k_dense_replace") == 0:
        return 0
    count, layers = config.count("first_k_dense_replace", 1), config.count("num_hidden_layers")
    if count >= layers:
        raise RecipeError(
            f"{config.file}: first_k_dense_replace={count} leaves none of {layers} layers to "
            "experts; copy the model's original config.json."
        )
    return count


def _check_groups(config: TypedJson, found: dict[str, Any], name: str) -> None:
    """Refuse choices of experts that Megatron's router does not make."""
    groups, chosen, each = found["n_group"], found["topk_group"], found["num_experts_per_tok"]
    if each < 2:
        raise RecipeError(
            f"{config.file}: num_experts_per_tok={each} is not supported with sigmoid scores; "
            f"only 2 and more are, which every published {name} model has."
        )
    if chosen > groups or found["num_experts"] % groups:
        raise RecipeError(
            f"{config.file}: n_group={groups} and topk_group={chosen} do not fit "
            f"{found['num_experts']} experts; copy the model's original config.json."
        )
    if groups > 1 and each // chosen != 2:  # groups are scored by as many of their best experts
        raise RecipeError(
            f"{config.file}: n_group={groups} is supported only where num_experts_per_tok is twice "
            f"topk_group, and they are {each} and {chosen}."
        )


FIXED = {"hidden_act": "silu", "norm_topk_prob": True, "transformers_weights": None}
MLPS = (  # dense layers first, then experts, one of them for every token
    *rows.only_in("dense", rows.DENSE_NORM, *rows.DENSE),
    *rows.only_in(
        "experts",
        rows.EXPERTS_NORM,
        rows.ROUTER,
        rows.SCORE_BIAS,
        *rows.shared_expert("mlp.shared_experts"),
        *rows.EXPERTS,
    ),
)
_COMMON = {
    "model_type": "glm4_moe",
    "vocab_size": 151552,
    "head_dim": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e6,
    "partial_rotary_factor": 0.5,
    "tie_word_embeddings": False,
    "attention_bias": True,
    "num_experts_per_tok": 8,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "n_group": 1,
    "topk_group": 1,
    "num_nextn_predict_layers": 1,
    "torch_dtype": "bfloat16",
    "eos_token_id": [151329, 151336, 151338],
    "pad_token_id": 151329,
}
_SIZES = (
    *DENSE,
    "n_routed_experts",
    "moe_intermediate_size",
    "first_k_dense_replace",
    "routed_scaling_factor",
    "use_qk_norm",
    "max_position_embeddings",
)
_LARGE = (5120, 12288, 92, 96, 8, 160, 1536, 3, 2.5, True)

GLM4_MOE = Family(
    model_type="glm4_moe",
    transformers="Glm4Moe",
    describe=_describe,
    fixed=FIXED,
    rows=rows.decoder(
        rows.ATTENTION_NORM,
        rows.QKV,
        rows.QKV_BIAS,
        *rows.QK_NORMS,
        rows.ATTENTION_OUT,
        *MLPS,
    ),
    partial_rotary=0.5,
    predicts_ahead=True,
    sample=llama.SAMPLE
    | {
        "head_dim": 16,
        "attention_bias": True,
        "use_qk_norm": True,
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "n_group": 2,
        "topk_group": 1,
        "moe_intermediate_size": 32,
        "first_k_dense_replace": 1,
        "routed_scaling_factor": 2.5,
    },
    published=published(
        _COMMON,
        {
            "GLM-4.5-Air": (4096, 10944, 46, 96, 8, 128, 1408, 1, 1.0, False, 131072),
            "GLM-4.5": (*_LARGE, 131072),
            "GLM-4.6, GLM-4.7": (*_LARGE, 202752),
        },
        _SIZES,
    ),
)
