"""Tensors as pickles that a server reads: under torch's names only."""

from __future__ import annotations

import pickle

import torch


def pickle_tensors(parts: list[tuple[str, torch.Tensor]]) -> bytes:
    """Return a pickle of named CPU tensors of any dtype.

    A view's storage is pickled whole, and Megatron's parameters are views of one buffer of all, so
    views are copied. A storage is pickled as a call of `torch.storage._load_from_bytes`, by that
    function's name. Megatron-Core 0.19 puts one of its own there, of another name, which SGLang
    refuses to load.
    """
    before = vars(torch.storage)["_load_from_bytes"]

    def load_from_bytes(data: bytes) -> object:
        return before(data)

    load_from_bytes.__module__, load_from_bytes.__qualname__ = "torch.storage", "_load_from_bytes"
    vars(torch.storage)["_load_from_bytes"] = load_from_bytes
    try:
        return pickle.dumps([(name, _alone(tensor)) for name, tensor in parts])
    finally:
        vars(torch.storage)["_load_from_bytes"] = before


def _alone(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor that has its storage to itself: the one given or a copy."""
    is_alone = tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    return tensor if is_alone else tensor.clone(memory_format=torch.contiguous_format)
