"""Sums on the device, one reduction a round: every mean is a global sum over a global count."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist

from iwopd_megatron.batch.trajectory import Trajectory
from iwopd_megatron.runtime import device
from iwopd_megatron.runtime.parallel import Parallel

NLL_SUMS = {"tokens": 1, "loss": 1}
DECILES, BINS = 10, 64
# Columns of the tables of position that an objective sums up, one value a loss token.
BY_POSITION = ("tokens", "reverse_kl", "weight", "logp")
_BY_DECILE = (*BY_POSITION, "abs_gap", "entropy", "drift")
# What each objective tells of every token, by decile of the response and on average.
BY_DECILE = {
    "policy": (*_BY_DECILE, "clipped", "tis_capped"),
    "topk_kl": (*_BY_DECILE, "topk_kl", "topk_mass_teacher", "topk_mass_student", "topk_hit"),
}


def sums_of(objective: str | None) -> dict[str, int]:
    """Return an objective's sums, by name how many numbers; None: given responses."""
    if objective is None:
        return NLL_SUMS
    columns = len(BY_DECILE[objective])
    return NLL_SUMS | {"deciles": DECILES * columns, "positions": BINS * len(BY_POSITION)}


def bin_tokens(max_response_tokens: int) -> int:
    """Return the tokens of each of the BINS equal parts of the longest response."""
    return -(-max_response_tokens // BINS)


def reduce_sums(
    kept: list[dict[str, torch.Tensor]],
    parallel: Parallel,
    sizes: dict[str, int],
    expert_tokens: torch.Tensor | None = None,
) -> dict[str, torch.Tensor]:
    """Return sums over micro-batches and ranks, fp64 on the CPU, by one all-reduce over the world.

    It is of sum(sizes) doubles. Tensor-parallel ranks hold the same statistics and earlier pipeline
    stages none: one rank of each adds its own. expert_tokens: `[layers, experts]`, of which every
    rank counted its own; its sum comes as "expert_tokens".
    """
    total = torch.zeros(sum(sizes.values()), dtype=torch.float64, device=device.current_device())
    if parallel.is_last_stage and parallel.tp.rank == 0:
        for sums in kept:
            total += torch.cat([sums[name].double().view(-1) for name in sizes])
    sizes = dict(sizes)
    if expert_tokens is not None:
        total = torch.cat([total, expert_tokens.double().view(-1)])
        sizes["expert_tokens"] = expert_tokens.numel()
    dist.all_reduce(total)
    return dict(zip(sizes, total.cpu().split(list(sizes.values())), strict=True))


def token_means(sums: dict[str, torch.Tensor], objective: str) -> dict[str, Any]:
    """Return means per loss token, of all and by position; None where there is no token.

    `X_deciles`: by tenth of the response; `X_positions`: by `bin_tokens` tokens; `tokens_...` are
    counts.
    """
    names = BY_DECILE[objective]
    deciles = sums["deciles"].view(DECILES, len(names))
    positions = sums["positions"].view(BINS, len(BY_POSITION))
    means = deciles.sum(0) / max(sums["tokens"].item(), 1)
    line = dict(zip(names[1:], means[1:].tolist(), strict=True))
    line["gap"] = -line["reverse_kl"]
    line |= {f"{name}_deciles": column for name, column in _columns(deciles, names)}
    return line | {f"{name}_positions": column for name, column in _columns(positions, BY_POSITION)}


def router_means(expert_tokens: torch.Tensor) -> dict[str, Any]:
    """Return how unevenly the tokens `[layers, experts]` lie on experts, by layer and on average.

    Busiest expert over the mean one (1 is even, experts / top k the worst), and standard deviation
    over mean.
    """
    even = expert_tokens.mean(1)
    busiest, spread = expert_tokens.amax(1) / even, expert_tokens.std(1, correction=0) / even
    return {
        "router_max_over_mean": busiest.mean().item(),
        "router_cv": spread.mean().item(),
        "router_max_over_mean_layers": busiest.tolist(),
        "router_cv_layers": spread.tolist(),
    }


def response_means(samples: list[Trajectory]) -> dict[str, float]:
    """Return means over the round's responses, which every rank knows."""
    count = len(samples)
    return {
        "accuracy": sum(sample.correct for sample in samples) / count,
        "response_length": sum(len(sample.response_ids) for sample in samples) / count,
        "truncated": sum(sample.truncated for sample in samples) / count,
    }


def distance_means(
    samples: list[Trajectory],
    student: list[list[float]],
    teacher: list[list[float]],
    max_response_tokens: int,
) -> dict[str, Any]:
    """Return how far answers are from the teacher, of log-probs of their tokens.

    held_out_reverse_kl: mean of student minus teacher, nats a token, and by `bin_tokens` tokens of
    position; teacher_perplexity: exp of the teacher's mean negative log-prob. student, teacher: a
    list for each sample, as long as its response.
    """
    width = bin_tokens(max_response_tokens)
    place_T = torch.cat([torch.arange(len(s.response_ids)) // width for s in samples])
    student_T, teacher_T = (
        torch.tensor(list(chain.from_iterable(logps))).double() for logps in (student, teacher)
    )
    gap_T = student_T - teacher_T
    columns = torch.stack([torch.ones_like(gap_T), gap_T], 1)
    positions = torch.zeros(BINS, 2, dtype=torch.float64).index_add_(0, place_T, columns)
    line = {
        "held_out_reverse_kl": gap_T.mean().item(),
        "teacher_perplexity": teacher_T.mean().neg().exp().item(),
        "bin_tokens": width,
    }
    names = "tokens", "held_out_reverse_kl"
    return line | {f"{name}_positions": column for name, column in _columns(positions, names)}


def _columns(table: torch.Tensor, names: tuple[str, ...]) -> Iterator[tuple[str, list]]:
    """Yield the first column as counts, then every other column divided by them."""
    counts, *columns = table.t().tolist()
    yield names[0], [round(count) for count in counts]
    for name, column in zip(names[1:], columns, strict=True):
        yield name, [x / n if n else None for x, n in zip(column, counts, strict=True)]
