"""Sizes of a config.json that contradict each other. Imports no torch."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from iwopd_megatron.errors import RecipeError

if TYPE_CHECKING:
    from iwopd_megatron.hf.config import HfConfig


def check_sizes(hf: HfConfig, file: Path | str) -> None:
    """Refuse sizes that contradict each other, and special ids outside the vocabulary."""
    if hf.num_attention_heads % hf.num_key_value_heads:
        raise RecipeError(
            f"{file}: num_key_value_heads={hf.num_key_value_heads} does not divide "
            f"num_attention_heads={hf.num_attention_heads}; copy the model's original config.json."
        )
    if hf.head_dim % 2 or hf.rotary_dim % 2 or not hf.rotary_dim:
        part = f" times partial_rotary_factor={hf.rope.partial_rotary_factor:g}"
        raise RecipeError(
            f"{file}: head_dim={hf.head_dim}{part * (hf.rotary_dim < hf.head_dim)} must be even, "
            "for rotary positions."
        )
    if hf.num_experts_per_tok > hf.num_experts:
        raise RecipeError(
            f"{file}: num_experts_per_tok={hf.num_experts_per_tok} exceeds the "
            f"{hf.num_experts} experts; copy the model's original config.json."
        )
    pad = () if hf.pad_token_id is None else (hf.pad_token_id,)
    for key, ids in (("pad_token_id", pad), ("eos_token_id", hf.eos_token_ids)):
        if any(token >= hf.vocab_size for token in ids):
            raise RecipeError(
                f"{file}: {key} {max(ids)} is not below vocab_size={hf.vocab_size}; "
                "copy the model's original config.json."
            )
