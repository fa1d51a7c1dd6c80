"""Mistral, dense: Llama's layers, head sizes of their own, and in the first release a window."""

from __future__ import annotations

from typing import Any

from iwopd_megatron.files.typed_json import TypedJson
from iwopd_megatron.hf.families import llama, rows
from iwopd_megatron.hf.families.family import Family
from iwopd_megatron.hf.families.published import published


def _describe(config: TypedJson) -> dict[str, Any]:
    """Return the fields: a missing sliding_window is 4096 tokens, null none."""
    has_window = config.content.get("sliding_window", 0) is not None
    return (
        llama.describe(config)
        | llama.missing_eos(config)
        | {"attention_window": config.count("sliding_window", 4096) if has_window else 0}
    )


_COMMON = {
    "model_type": "mistral",
    "vocab_size": 131072,
    "head_dim": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e6,
    "max_position_embeddings": 32768,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
_7B, _NEMO = "Mistral-7B-Instruct-v0.3", "Mistral-Nemo-Instruct-2407"
_24B = "Mistral-Small-24B-Instruct-2501"

MISTRAL = Family(
    model_type="mistral",
    transformers="Mistral",
    describe=_describe,
    fixed=llama.FIXED,
    rows=rows.decoder(*llama.ATTENTION, *llama.DENSE),
    sample=llama.SAMPLE | {"head_dim": 32, "sliding_window": None},
    published=published(
        _COMMON,
        {
            f"Mistral-7B-v0.3, {_7B}": (4096, 14336, 32, 32, 8),
            f"Mistral-Nemo-Base-2407, {_NEMO}": (5120, 14336, 40, 32, 8),
            f"Mistral-Small-24B-Base-2501, {_24B}": (5120, 32768, 40, 32, 8),
        },
        vocab_size=dict.fromkeys(("Mistral-7B-v0.3", _7B), 32768),
        max_position_embeddings={"Mistral-Nemo-Base-2407": 131072, _NEMO: 131072},
        rope_theta=dict.fromkeys(("Mistral-Small-24B-Base-2501", _24B), 1e8),
    ),
)
