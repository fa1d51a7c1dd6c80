"""A teacher's scores of a sample, and their way from micro-batches to samples and back.

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
    """A teacher's log-probs (nats) of a sample's response tokens, and of its likeliest tokens."""

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
    """Return ids (int32) and log-probs (fp32) `[T, K]` of every sample, on every rank. Collective.

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
    all_ids, all_logp = ids.cpu().numpy(), logp.cpu().numpy()
    return [(all_ids[a:b], all_logp[a:b]) for a, b in parts]


def by_batch(batches: list[MicroBatch], scores: Mapping[int, Scores]) -> list[Support]:
    """Return the supports of these micro-batches from top-K scores by `Trajectory.index`."""
    tables = {
        index: (found.topk_ids, found.topk_logp)
        for index, found in scores.items()
        if found.topk_ids is not None and found.topk_logp is not None
    }
    return [_support(batch, tables) for batch in batches]


def _support(
    batch: MicroBatch, tables: Mapping[int, tuple[numpy.ndarray, numpy.ndarray]]
) -> Support:
    topk = next(iter(tables.values()))[0].shape[1] if tables else 0
    owner, offset = batch.owner.cpu().numpy(), batch.offset.cpu().numpy()
    ids = numpy.zeros((len(owner), topk), dtype=numpy.int64)
    logp = numpy.zeros((len(owner), topk), dtype=numpy.float32)
    for index in numpy.unique(owner):
        rows = owner == index
        own_ids, own_logp = tables[index]
        ids[rows], logp[rows] = own_ids[offset[rows]], own_logp[offset[rows]]
    on = batch.rows.device
    return Support(torch.from_numpy(ids).to(on), torch.from_numpy(logp).to(on))
