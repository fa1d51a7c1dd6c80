"""What a teacher says of one sample, and its way from micro-batches to samples and back.

Shapes: T response tokens of a sample, N loss tokens of a micro-batch, K tokens of a support.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy
import torch
import torch.distributed as dist

from iwopd_megatron.batch.packing import MicroBatch, Support, response_places
from iwopd_megatron.batch.trajectory import Trajectory
from iwopd_megatron.runtime import device
from iwopd_megatron.runtime.parallel import Parallel


@dataclass(frozen=True)
class Scores:
    """Log-probs of a sample's response tokens, in nats."""

    logp: numpy.ndarray  # [T] fp32
    topk_ids: numpy.ndarray | None = None  # [T, K] int32, likeliest first
    topk_logp: numpy.ndarray | None = None  # [T, K] fp32


def by_sample(
    samples: list[Trajectory],
    batches: list[MicroBatch],
    supports: list[Support],
    topk: int,
    parallel: Parallel,
) -> list[tuple[numpy.ndarray, numpy.ndarray]]:
    """Ids and log-probs `[T, K]` of every sample, on every rank. Collective.

    batches, supports: this rank's, supports on the last stage only. Two all-reduces of K 32-bit
    numbers per response token.
    """
    starts, first = response_places(samples)
    ids = torch.zeros(starts[-1], topk, dtype=torch.int32, device=device.current_device())
    logp = torch.zeros_like(ids, dtype=torch.float32)
    if parallel.tp.rank == 0 and supports:
        for batch, (batch_ids, batch_logp) in zip(batches, supports, strict=True):
            rows = first.to(ids.device)[batch.owner] + batch.offset
            ids[rows], logp[rows] = batch_ids.int(), batch_logp
    for tensor in (ids, logp):
        dist.all_reduce(tensor)
    parts = zip(starts, starts[1:], strict=False)
    ids, logp = ids.cpu().numpy(), logp.cpu().numpy()
    return [(ids[a:b], logp[a:b]) for a, b in parts]


def by_batch(batches: list[MicroBatch], scores: Mapping[int, Scores]) -> list[Support]:
    """The supports of these micro-batches from top-K scores by `Trajectory.index`."""
    return [_support(batch, scores) for batch in batches]


def _support(batch: MicroBatch, scores: Mapping[int, Scores]) -> Support:
    topk = next(iter(scores.values())).topk_ids.shape[1] if scores else 0
    owner, offset = batch.owner.cpu().numpy(), batch.offset.cpu().numpy()
    ids = numpy.zeros((len(owner), topk), dtype=numpy.int64)
    logp = numpy.zeros((len(owner), topk), dtype=numpy.float32)
    for index in numpy.unique(owner):
        rows = owner == index
        ids[rows] = scores[index].topk_ids[offset[rows]]
        logp[rows] = scores[index].topk_logp[offset[rows]]
    on = batch.rows.device
    return torch.from_numpy(ids).to(on), torch.from_numpy(logp).to(on)
