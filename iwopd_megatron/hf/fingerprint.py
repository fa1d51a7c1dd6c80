"""What must agree between two models for one to score the other's tokens, small enough to send."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import xxhash
from transformers import AutoTokenizer

from iwopd_megatron.hf.folder import eos_ids


def tokenizer_fingerprints(tokenizer: Any) -> dict[str, str]:
    """xxh3 of the sorted vocabulary, the special tokens and the chat template, 16 digits each."""
    parts = {
        "vocabulary": sorted(tokenizer.get_vocab().items()),
        "special_tokens": sorted(tokenizer.special_tokens_map.items()),
        "chat_template": tokenizer.chat_template,
    }
    return {name: _digest(part) for name, part in parts.items()}


def identity(folder: Path, tokenizer: Any) -> dict[str, Any]:
    """What a server at this Hugging Face folder tells about its model; JSON types only."""
    config = json.loads((folder / "config.json").read_text())
    tokens = tokenizer_fingerprints(tokenizer)
    return {
        "vocab_size": config["vocab_size"],
        "eos_token_ids": sorted(eos_ids(folder)),
        "tokenizer": tokens,
        "tokenizer_fingerprint": _digest(tokens),
        "config_fingerprint": _digest(config),
    }


def with_identity(info: dict[str, Any]) -> dict[str, Any]:
    """A server's /model_info with what it leaves out but its folder tells, if it can be read here.

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
