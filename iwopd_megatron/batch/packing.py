"""How samples become packed micro-batches: balanced over data-parallel ranks, denominators global.

A sample of P prompt and T response tokens feeds P + T - 1 inputs; input P - 1 + t predicts response
token t. Packing is the same on every rank, so all know all denominators without asking. Shapes: T
tokens of this context-parallel rank, N loss tokens among them, K tokens of a teacher's support.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

import numpy
import torch

from iwopd_megatron.batch.routing import cut_routes
from iwopd_megatron.batch.trajectory import Trajectory
from iwopd_megatron.errors import RecipeError
from iwopd_megatron.loss.policy import token_denominator
from iwopd_megatron.runtime import device
from iwopd_megatron.runtime.megatron import PackedSeqParams
from iwopd_megatron.runtime.parallel import Parallel, packed_seq_params, zigzag_index

SCORES = ("rollout_logp", "teacher_logp", "base_logp", "old_logp")


class Support(NamedTuple):
    """A teacher's likeliest tokens at the loss tokens of one micro-batch, on its device."""

    ids: torch.Tensor  # [N, K] int64
    logp: torch.Tensor  # [N, K] fp32, nats


@dataclass(frozen=True)
class MicroBatch:
    """This rank's share of one packed micro-batch, on its device. Log-probs are fp32, in nats."""

    tokens: torch.Tensor  # [1, T] int64
    positions: torch.Tensor  # [1, T] int64, inside each sequence
    packed: PackedSeqParams
    segments: torch.Tensor  # [T] int64
    num_segments: int
    rows: torch.Tensor  # [N] int64: local positions that predict a loss token
    targets: torch.Tensor  # [N] int64
    place: torch.Tensor  # [N] int64: t * 10 // T, the decile of the response
    owner: torch.Tensor  # [N] int64: Trajectory.index
    offset: torch.Tensor  # [N] int64: t
    denominator: torch.Tensor  # [N] fp32
    rollout_logp: torch.Tensor  # [N]
    teacher_logp: torch.Tensor  # [N]
    base_logp: torch.Tensor  # [N]
    old_logp: torch.Tensor | None  # [N]; None: this forward's own, detached
    experts: torch.Tensor | None  # [layers, T / tp, top k] on the host, to be replayed
    is_real: torch.Tensor  # [T / tp] bool: no padding, of this tensor-parallel rank
    support: Support | None = None  # where the loss reads one

    @property
    def support_ids(self) -> torch.Tensor | None:
        """Return the support's ids `[N, K]`, None without a support."""
        return None if self.support is None else self.support.ids


@dataclass(frozen=True)
class Packer:
    """How samples are packed for one mesh: tokens of a micro-batch, attention's share of cost.

    A sequence of L tokens costs L + attention_cost * L^2 (`flops.attention_cost`).
    """

    parallel: Parallel
    budget: int
    attention_cost: float = 0.0

    def __call__(
        self, samples: list[Trajectory], aggregation: str = "token_mean"
    ) -> tuple[list[MicroBatch], int]:
        """Return this rank's micro-batches of one optimiser step, and the longest's uncut tokens.

        Samples that no loss reads are left out. With pipeline stages every micro-batch is padded
        to that length, so that they exchange tensors of one known shape; without, to its own.
        RecipeError if a sequence exceeds the budget.
        """
        samples = [sample for sample in samples if sample.loss_tokens]
        layout, dp = self.parallel.layout, self.parallel.dp
        lengths = [round_up(sample.inputs, layout.token_multiple) for sample in samples]
        multiple = layout.pp if layout.vpp > 1 else 1
        plan = plan_microbatches(lengths, self.budget, dp.size, multiple, self.attention_cost)
        totals = [[sum(lengths[i] for i in bin) for bin in rank] for rank in plan]
        longest = round_up(max(1, *map(max, totals)), layout.microbatch_multiple)
        tokens = sum(sample.loss_tokens for sample in samples)
        batches = []
        for bin, total in zip(plan[dp.rank], totals[dp.rank], strict=True):
            own = round_up(max(total, 1), layout.microbatch_multiple)
            batches.append(
                _build(
                    [samples[i] for i in bin],
                    self.parallel,
                    longest if layout.pp > 1 else own,
                    aggregation,
                    len(samples),
                    tokens,
                )
            )
        return batches, longest


def plan_microbatches(
    lengths: list[int], budget: int, dp: int, multiple_of: int, attention_cost: float = 0.0
) -> list[list[list[int]]]:
    """Return sequences of `dp` ranks x equally many micro-batches: [dp][micro-batch][sequence].

    As few micro-batches as a longest-first filling keeps within `budget` tokens; among so many, the
    costs L + attention_cost * L^2 are spread evenly. Their number is a multiple of `multiple_of`
    (for the interleaved pipeline schedule). Micro-batches that ranks run at the same time cost
    nearly the same, since expert parallelism makes them wait for each other.
    """
    longest = max(lengths, default=0)
    if longest > budget:
        raise RecipeError(
            f"a sequence of {longest} tokens exceeds train.microbatch_tokens={budget}; "
            f"raise it to at least {longest}."
        )
    costs = [length + attention_cost * length**2 for length in lengths]
    count = -(-max(1, -(-sum(lengths) // (budget * dp))) // multiple_of) * multiple_of
    while (bins := _fill(lengths, lengths, budget, dp * count)) is None:
        count += multiple_of
    # Balancing cost may need room that balancing tokens does not: then tokens it is.
    bins = _fill(costs, lengths, budget, dp * count) or bins
    return _spread(bins, [sum(costs[i] for i in bin) for bin in bins], dp)


# By hand: plain bin packing bounds one quantity; here tokens are bounded and cost is evened.
def _fill(
    costs: Sequence[float], lengths: list[int], budget: int, count: int
) -> list[list[int]] | None:
    """Fill `count` bins: the costliest sequence next into the cheapest bin with room for it."""
    bins: list[list[int]] = [[] for _ in range(count)]
    tokens = [0] * count
    heap: list[tuple[float, int]] = [(0.0, b) for b in range(count)]
    for i in sorted(range(len(lengths)), key=lambda i: (-costs[i], i)):
        full = []
        while heap and tokens[heap[0][1]] + lengths[i] > budget:
            full.append(heapq.heappop(heap))
        if not heap:
            return None
        cost, b = heapq.heappop(heap)
        bins[b].append(i)
        tokens[b] += lengths[i]
        for entry in [*full, (cost + costs[i], b)]:
            heapq.heappush(heap, entry)
    return bins


def _spread(bins: list[list[int]], costs: list[float], dp: int) -> list[list[list[int]]]:
    """Deal bins of like cost to the same time, the costlier to the rank with less so far."""
    order = sorted(range(len(bins)), key=lambda b: (-costs[b], b))
    plan: list[list[list[int]]] = [[] for _ in range(dp)]
    load = [0.0] * dp
    for start in range(0, len(order), dp):
        ranks = sorted(range(dp), key=lambda rank: (load[rank], rank))
        for rank, b in zip(ranks, order[start : start + dp], strict=True):
            plan[rank].append(bins[b])
            load[rank] += costs[b]
    return plan


def response_places(samples: list[Trajectory]) -> tuple[list[int], torch.Tensor]:
    """Return where each sample's tokens begin, and the last's end, among all response tokens.

    And, int64 on the CPU, where those of a `Trajectory.index` begin.
    """
    starts = [0, *accumulate(len(sample.response_ids) for sample in samples)]
    first = torch.zeros(1 + max(sample.index for sample in samples), dtype=torch.long)
    first[[sample.index for sample in samples]] = torch.tensor(starts[:-1])
    return starts, first


def deal(samples: list[Trajectory], parts: int) -> list[list[Trajectory]]:
    """Cut a round's samples into `parts` runs, the minibatches of its optimiser steps."""
    bounds = [len(samples) * i // parts for i in range(parts + 1)]
    return [samples[a:b] for a, b in zip(bounds, bounds[1:], strict=False)]


def round_up(n: int, multiple: int) -> int:
    """Return the least multiple of `multiple` that is not less than `n`."""
    return -(-n // multiple) * multiple


def _build(
    samples: list[Trajectory],
    parallel: Parallel,
    total: int,
    aggregation: str,
    responses: int,
    tokens: int,
) -> MicroBatch:
    layout = parallel.layout
    lengths = [round_up(sample.inputs, layout.token_multiple) for sample in samples]
    if sum(lengths) < total:
        lengths.append(total - sum(lengths))  # padding: a last segment that no loss reads
    ids = numpy.zeros((8, total), dtype=numpy.int64)
    token, position, segment, is_loss, target, offset, owner, is_real = ids
    values = numpy.zeros((2 + len(SCORES), total), dtype=numpy.float32)
    denominator, response_length = values[:2]
    segment[:] = numpy.repeat(numpy.arange(len(lengths)), lengths)
    position[:] = numpy.concatenate([numpy.arange(length) for length in lengths])
    starts = [0, *accumulate(lengths)]
    for start, sample in zip(starts, samples, strict=False):
        response = len(sample.response_ids)
        loss = slice(start + len(sample.prompt_ids) - 1, start + sample.inputs)
        token[start : start + sample.inputs] = (sample.prompt_ids + sample.response_ids)[:-1]
        is_loss[loss] = sample.is_read
        is_real[start : start + sample.inputs] = True
        target[loss] = sample.response_ids
        offset[loss] = numpy.arange(response)
        owner[loss] = sample.index
        denominator[loss] = token_denominator(aggregation, sample.loss_tokens, responses, tokens)
        response_length[loss] = response
        for row, name in zip(values[2:], SCORES, strict=True):
            row[loss] = getattr(sample, name) or 0
    index = zigzag_index(lengths, layout.cp, parallel.cp.rank)
    column, value = torch.from_numpy(ids)[:, index], torch.from_numpy(values)[:, index]
    rows = column[3].nonzero().squeeze(1)
    on = device.current_device()
    column, kept, value = column.to(on), column[:, rows].to(on), value[:, rows].to(on)
    scores = dict(zip(SCORES, value[2:], strict=True))
    has_old = bool(samples and samples[0].old_logp)
    return MicroBatch(
        tokens=column[0][None],
        positions=column[1][None],
        packed=packed_seq_params(lengths),
        segments=column[2],
        num_segments=len(lengths),
        rows=rows.to(on),
        targets=kept[4],
        place=kept[5] * 10 // value[1].long(),
        owner=kept[6],
        offset=kept[5],
        denominator=value[0],
        experts=cut_routes(samples, lengths, index, parallel.tp),
        is_real=column[7].view(parallel.tp.size, -1)[parallel.tp.rank].bool(),
        rollout_logp=scores["rollout_logp"],
        teacher_logp=scores["teacher_logp"],
        base_logp=scores["base_logp"],
        old_logp=scores["old_logp"] if has_old else None,
    )
