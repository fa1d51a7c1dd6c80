"""Qwen3, dense: grouped queries with a norm on queries and keys, SwiGLU."""

from __future__ import annotations

from typing import Any

from iwopd_megatron.files.typed_json import TypedJson
from iwopd_megatron.hf.families import rows
from iwopd_megatron.hf.families.family import Family
from iwopd_megatron.hf.families.published import published

ATTENTION = (rows.ATTENTION_NORM, rows.QKV, *rows.QK_NORMS, rows.ATTENTION_OUT)
FIXED = {
    "attention_bias": False,
    "use_sliding_window": False,
    "hidden_act": "silu",
    "transformers_weights": None,  # names another weight file than the folder's usual one
}
SAMPLE = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-6,
    "pad_token_id": 300,
}
COMMON = {
    "vocab_size": 151936,
    "head_dim": 128,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "max_position_embeddings": 40960,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
    "attention_bias": False,
    "torch_dtype": "bfloat16",
    "eos_token_id": 151645,
}
LONG = 262144  # tokens, of the releases of July 2025


def _describe(config: TypedJson) -> dict[str, Any]:
    heads = config.count("num_attention_heads")
    groups = heads  # null means as many as query heads, nothing is an error
    if config.content.get("num_key_value_heads", heads) is not None:
        groups = config.count("num_key_value_heads")
    return {
        "num_key_value_heads": groups,
        "head_dim": config.count("head_dim"),
        "qk_norm": True,
    }


_TIED = "Qwen3-0.6B", "Qwen3-1.7B", "Qwen3-4B", "Qwen3-4B-Instruct-2507"
_NEWER = "Qwen3-4B-Instruct-2507"

QWEN3 = Family(
    model_type="qwen3",
    transformers="Qwen3",
    describe=_describe,
    fixed=FIXED,
    rows=rows.decoder(*ATTENTION, rows.DENSE_NORM, *rows.DENSE),
    sample=SAMPLE,
    published=published(
        {"model_type": "qwen3"} | COMMON,
        {
            "Qwen3-0.6B": (1024, 3072, 28, 16, 8),
            "Qwen3-1.7B": (2048, 6144, 28, 16, 8),
            "Qwen3-4B, Qwen3-4B-Instruct-2507": (2560, 9728, 36, 32, 8),
            "Qwen3-8B": (4096, 12288, 36, 32, 8),
            "Qwen3-14B": (5120, 17408, 40, 40, 8),
            "Qwen3-32B": (5120, 25600, 64, 64, 8),
        },
        tie_word_embeddings=dict.fromkeys(_TIED, True),
        max_position_embeddings={_NEWER: LONG},
        rope_theta={_NEWER: 5e6},
    ),
)
