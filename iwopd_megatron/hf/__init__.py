"""What a Hugging Face folder is: its configuration, shapes, headers, tokenizer and companions.

In comes a folder; out goes an `HfConfig`, frozen and typed, or one sentence on why the folder
cannot be read. No weight is read here, and no torch is imported.
"""

__all__ = [
    "agreement",
    "answer_end",
    "companions",
    "config",
    "families",
    "fingerprint",
    "flops",
    "folder",
    "headers",
    "known_models",
    "rope",
    "shapes",
]
