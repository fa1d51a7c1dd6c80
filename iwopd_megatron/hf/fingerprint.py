"""Fingerprints of a model's tokenizer and config, small enough for a server to tell."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import xxhash
from transformers import AutoTokenizer

from iwopd_megatron.hf.config import read_hf_config, read_json
from iwopd_megatron.hf.folder import eos_ids


def tokenizer_fingerprints(tokenizer: Any) -> dict[str, str]:
    """Return xxh3 of sorted vocabulary, special tokens and chat template, in 16 hex digits each."""
    parts = {
        "vocabulary": sorted(tokenizer.get_vocab().items()),
        "special_tokens": sorted(tokenizer.special_tokens_map.items()),
        "chat_template": tokenizer.chat_template,
    }
    return {name: _digest(part) for name, part in parts.items()}


def identity(folder: Path, tokenizer: Any) -> dict[str, Any]:
    """Return what a server of this Hugging Face folder tells about its model; JSON types only.

    Keys: vocab_size, eos_token_ids, tokenizer, tokenizer_fingerprint, config_fingerprint.
    """
    tokens = tokenizer_fingerprints(tokenizer)
    return {
        "vocab_size": read_hf_config(folder).vocab_size,
        "eos_token_ids": sorted(eos_ids(folder)),
        "tokenizer": tokens,
        "tokenizer_fingerprint": _digest(tokens),
        "config_fingerprint": _digest(read_json(folder, "config.json")),
    }


def with_identity(info: dict[str, Any]) -> dict[str, Any]:
    """Add to a server's /model_info the `identity` of its folder, if that can be read here.

    SGLang names its model's and tokenizer's folders and nothing more.
    """
    folder = Path(info.get("model_path") or "")
    if "tokenizer_fingerprint" in info or not (folder / "config.json").is_file():
        return info
    tokenizer = AutoTokenizer.from_pretrained(info.get("tokenizer_path") or folder)
    return info | identity(folder, tokenizer)


def _digest(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, default=str)
    return xxhash.xxh3_64_hexdigest(text.encode())
