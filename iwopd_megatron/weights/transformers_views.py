"""Weights of a transformers model in memory, under the names that they have in its files."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

import torch


def named_views(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return the weights of a transformers model by their names in files, as views.

    Its parameters, and the buffers that routers choose by.
    """
    buffers = (
        (x, one) for x, one in model.named_buffers() if x.endswith(".e_score_correction_bias")
    )
    return _unfused((name, x.data) for name, x in (*model.named_parameters(), *buffers))


def named_gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return the gradients of all parameters that have one, named as by `named_views`."""
    parameters = model.named_parameters()
    return _unfused((name, x.grad) for name, x in parameters if x.grad is not None)


def _unfused(tensors: Iterable[tuple[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Return views of what transformers 5 fuses in memory, a layer's experts.

    gate_up_proj is [E, 2F, D], down_proj [E, D, F].
    """
    views = {}
    for name, tensor in tensors:
        fused = re.fullmatch(r"(.*\.experts\.)(gate_up_proj|down_proj)", name)
        if fused is None:
            views[name] = tensor
            continue
        prefix, kind = fused.groups()
        for e, expert in enumerate(tensor):
            if kind == "down_proj":
                views[f"{prefix}{e}.down_proj.weight"] = expert
            else:
                gate, up = expert.chunk(2)
                views[f"{prefix}{e}.gate_proj.weight"] = gate
                views[f"{prefix}{e}.up_proj.weight"] = up
    return views


def random_weights(folder: Path, seed: int) -> dict[str, torch.Tensor]:
    """Return fresh fp32 weights for a folder's config, initialised as transformers does."""
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = AutoConfig.from_pretrained(folder)
        return named_views(AutoModelForCausalLM.from_config(config, dtype=torch.float32))
