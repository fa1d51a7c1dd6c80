"""Llama and what shares its architecture: no norm on queries and keys, no biases, SwiGLU."""

from __future__ import annotations

from typing import Any

from iwopd_megatron.errors import RecipeError
from iwopd_megatron.files.typed_json import TypedJson
from iwopd_megatron.hf.families import rows
from iwopd_megatron.hf.families.family import Family, head_dim_or_null, heads_or_null
from iwopd_megatron.hf.families.published import published

ATTENTION = (rows.ATTENTION_NORM, rows.QKV, rows.ATTENTION_OUT)
DENSE = (rows.DENSE_NORM, *rows.DENSE)
FIXED = {"hidden_act": "silu", "transformers_weights": None}
SAMPLE = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "pad_token_id": 300,
}


def describe(config: TypedJson) -> dict[str, Any]:
    """Return the fields of a model whose heads are as Llama has them."""
    return {
        "num_key_value_heads": heads_or_null(config),
        "head_dim": head_dim_or_null(config),
    }


def missing_eos(config: TypedJson) -> dict[str, Any]:
    """Return the EOS id that transformers takes where a config.json of Llama's line names none."""
    return {} if "eos_token_id" in config.content else {"eos_token_ids": (2,)}


def _describe(config: TypedJson) -> dict[str, Any]:
    hidden, heads = config.count("hidden_size"), config.count("num_attention_heads")
    if hidden % heads:  # which transformers' class refuses, even with a head_dim
        raise RecipeError(
            f"{config.file}: num_attention_heads={heads} does not divide hidden_size={hidden}; "
            "copy the model's original config.json."
        )
    return describe(config) | missing_eos(config)


_LLAMA3 = {
    "model_type": "llama",
    "vocab_size": 128256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 5e5,
    "max_position_embeddings": 131072,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
_STRETCHED = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
_SMALL = ("Llama-3.2-1B", "Llama-3.2-1B-Instruct", "Llama-3.2-3B", "Llama-3.2-3B-Instruct")
_SMOL = {
    "model_type": "llama",
    "vocab_size": 49152,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e5,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
}

LLAMA = Family(
    model_type="llama",
    transformers="Llama",
    describe=_describe,
    fixed=FIXED | {"attention_bias": False, "mlp_bias": False},
    rows=rows.decoder(*ATTENTION, *DENSE),
    sample=SAMPLE,
    published=published(
        _LLAMA3 | {"rope_scaling": _STRETCHED},
        {
            "Llama-3.2-1B, Llama-3.2-1B-Instruct": (2048, 8192, 16, 32, 8),
            "Llama-3.2-3B, Llama-3.2-3B-Instruct": (3072, 8192, 28, 24, 8),
            "Llama-3.1-8B, Llama-3.1-8B-Instruct, DeepSeek-R1-Distill-Llama-8B": (
                4096,
                14336,
                32,
                32,
                8,
            ),
            "Llama-3.1-70B, Llama-3.1-70B-Instruct, Llama-3.3-70B-Instruct, "
            "DeepSeek-R1-Distill-Llama-70B": (8192, 28672, 80, 64, 8),
        },
        tie_word_embeddings=dict.fromkeys(_SMALL, True),
        rope_scaling=dict.fromkeys(_SMALL, _STRETCHED | {"factor": 32.0}),
    )
    | published(
        _SMOL,
        {
            "SmolLM2-135M, SmolLM2-135M-Instruct": (576, 1536, 30, 9, 3),
            "SmolLM2-360M, SmolLM2-360M-Instruct": (960, 2560, 32, 15, 5),
            "SmolLM2-1.7B, SmolLM2-1.7B-Instruct": (2048, 8192, 24, 32, 32),
        },
        rope_theta=dict.fromkeys(("SmolLM2-1.7B", "SmolLM2-1.7B-Instruct"), 130000.0),
    ),
)
