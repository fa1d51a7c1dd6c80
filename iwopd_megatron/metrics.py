"""Sums on the device, one reduction a round: every mean is a global sum over a global count."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from iwopd_megatron import device
from iwopd_megatron.parallel import Parallel
from iwopd_megatron.trajectory import Trajectory

NLL_SUMS = {"tokens": 1, "loss": 1}
_DISTILLATION_SUMS = NLL_SUMS | {
    "gap": 1, "abs_gap": 1, "weight": 1, "entropy": 1, "drift": 1,
    "decile_tokens": 10, "gap_deciles": 10, "weight_deciles": 10,
}  # fmt: skip
# What each objective's sums are, and how many numbers each.
SUMS = {
    "policy": _DISTILLATION_SUMS | {"clipped": 1, "tis_capped": 1},
    "topk_kl": _DISTILLATION_SUMS
    | {"topk_kl": 1, "topk_mass_teacher": 1, "topk_mass_student": 1, "topk_hit": 1},
}


def reduce_sums(
    kept: list[dict[str, torch.Tensor]], parallel: Parallel, sizes: dict[str, int]
) -> dict[str, torch.Tensor]:
    """Sums over micro-batches and ranks, fp64 on the CPU, by one all-reduce over the world.

    The all-reduce is of sum(sizes) doubles. Tensor-parallel ranks hold the same statistics and
    earlier pipeline stages none: one rank of each speaks.
    """
    total = torch.zeros(sum(sizes.values()), dtype=torch.float64, device=device.current_device())
    if parallel.is_last_stage and parallel.tp.rank == 0:
        for sums in kept:
            total += torch.cat([sums[name].double().view(-1) for name in sizes])
    dist.all_reduce(total)
    return dict(zip(sizes, total.cpu().split(list(sizes.values())), strict=True))


def token_means(sums: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Means per loss token; deciles without a token are null."""
    tokens = sums["tokens"].item()
    names = [name for name in sums if sums[name].numel() == 1 and name not in NLL_SUMS]
    means = {name: sums[name].item() / max(tokens, 1) for name in names}
    deciles = {
        name: [
            _ratio(s, n)
            for s, n in zip(sums[name].tolist(), sums["decile_tokens"].tolist(), strict=True)
        ]
        for name in ("gap_deciles", "weight_deciles")
    }
    return {**means, "reverse_kl": -means["gap"], **deciles}


def response_means(samples: list[Trajectory]) -> dict[str, float]:
    """Means over the round's responses, which every rank knows."""
    count = len(samples)
    return {
        "accuracy": sum(sample.correct for sample in samples) / count,
        "response_length": sum(len(sample.response_ids) for sample in samples) / count,
        "truncated": sum(sample.truncated for sample in samples) / count,
    }


def _ratio(total: float, count: float) -> float | None:
    return total / count if count else None
