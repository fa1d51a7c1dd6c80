"""Qwen3-MoE: Qwen3's attention, and experts behind a softmax router in every layer."""

from __future__ import annotations

from typing import Any

from iwopd_megatron.files.typed_json import TypedJson
from iwopd_megatron.hf.families import qwen3, rows
from iwopd_megatron.hf.families.family import Family, head_dim_or_share
from iwopd_megatron.hf.families.published import DENSE, published


def _describe(config: TypedJson) -> dict[str, Any]:
    """Return the fields; transformers 5's num_local_experts wins over num_experts."""
    newer = config.content.get("num_local_experts") is not None
    return {
        "num_key_value_heads": config.count("num_key_value_heads"),
        "head_dim": head_dim_or_share(config),
        "qk_norm": True,
        "num_experts": config.count("num_local_experts" if newer else "num_experts"),
        "moe_intermediate_size": config.count("moe_intermediate_size"),
        "num_experts_per_tok": config.count("num_experts_per_tok"),
        "norm_topk_prob": config.flag("norm_topk_prob"),
    }


EVERY_LAYER = {"mlp_only_layers": [], "decoder_sparse_step": 1}  # has experts
_SIZES = (*DENSE, "moe_intermediate_size")
_30B, _235B = (f"Qwen3-{size}-Instruct-2507" for size in ("30B-A3B", "235B-A22B"))

QWEN3_MOE = Family(
    model_type="qwen3_moe",
    transformers="Qwen3Moe",
    describe=_describe,
    fixed=qwen3.FIXED | EVERY_LAYER,
    null_means_default=("mlp_only_layers",),
    rows=rows.decoder(*qwen3.ATTENTION, rows.EXPERTS_NORM, rows.ROUTER, *rows.EXPERTS),
    sample=qwen3.SAMPLE
    | {
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "norm_topk_prob": True,
    },
    published=published(
        {"model_type": "qwen3_moe", "num_experts": 128, "num_experts_per_tok": 8}
        | {"norm_topk_prob": True}
        | EVERY_LAYER
        | qwen3.COMMON,
        {
            f"Qwen3-30B-A3B, {_30B}": (2048, 6144, 48, 32, 4, 768),
            f"Qwen3-235B-A22B, {_235B}": (4096, 12288, 94, 64, 4, 1536),
        },
        _SIZES,
        max_position_embeddings=dict.fromkeys((_30B, _235B), qwen3.LONG),
        rope_theta={_30B: 1e7, _235B: 5e6},
    ),
)
