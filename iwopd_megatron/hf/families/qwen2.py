"""Qwen2 and Qwen2.5, dense: Llama's layers with biases on queries, keys and values."""

from __future__ import annotations

from typing import Any

from iwopd_megatron.files.typed_json import TypedJson
from iwopd_megatron.hf.families import llama, rows
from iwopd_megatron.hf.families.family import Family
from iwopd_megatron.hf.families.published import published


def _describe(config: TypedJson) -> dict[str, Any]:
    return llama.describe(config) | {"qkv_bias": True}


_COMMON = {
    "model_type": "qwen2",
    "vocab_size": 152064,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "max_position_embeddings": 32768,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
_SIZES = {
    "0.5B": (896, 4864, 24, 14, 2),
    "1.5B": (1536, 8960, 28, 12, 2),
    "3B": (2048, 11008, 36, 16, 2),
    "7B": (3584, 18944, 28, 28, 4),
    "14B": (5120, 13824, 48, 40, 8),
    "32B": (5120, 27648, 64, 40, 8),
    "72B": (8192, 29568, 80, 64, 8),
}
_SMALL = [f"Qwen2.5-{size}{kind}" for size in ("0.5B", "1.5B", "3B") for kind in ("", "-Instruct")]

QWEN2 = Family(
    model_type="qwen2",
    transformers="Qwen2",
    describe=_describe,
    fixed=llama.FIXED | {"use_sliding_window": False},
    rows=rows.decoder(
        rows.ATTENTION_NORM, rows.QKV, rows.QKV_BIAS, rows.ATTENTION_OUT, *llama.DENSE
    ),
    sample=llama.SAMPLE,
    published=published(
        _COMMON,
        {f"Qwen2.5-{size}, Qwen2.5-{size}-Instruct": row for size, row in _SIZES.items()},
        tie_word_embeddings=dict.fromkeys(_SMALL, True),
        vocab_size=dict.fromkeys(_SMALL, 151936),
    ),
)
