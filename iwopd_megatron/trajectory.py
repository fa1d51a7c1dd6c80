"""One sample, and how a round's samples become packed micro-batches.

A sample of P prompt and T response tokens feeds P + T - 1 inputs; input P - 1 + t predicts response
token t. Packing is the same on every rank, so all know all denominators without asking. Shapes: T
tokens of this context-parallel rank, N loss tokens among them.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass, field, replace
from itertools import accumulate

import numpy
import torch

from iwopd_megatron import device
from iwopd_megatron.config import Layout
from iwopd_megatron.errors import RecipeError
from iwopd_megatron.loss import token_denominator
from iwopd_megatron.parallel import PackedSeqParams, Parallel, packed_seq_params, zigzag_index


@dataclass(frozen=True)
class Trajectory:
    """A prompt and the student's answer to it, exact token ids as the engine produced them."""

    index: int  # place in the round
    prompt_ids: list[int]
    response_ids: list[int]  # EOS included unless truncated
    rollout_logp: list[float] = field(
        default_factory=list
    )  # engine, nats, at the rollout temperature
    teacher_logp: list[float] = field(default_factory=list)
    truncated: bool = False
    weight_version: int = 0
    correct: float = 0.0

    @property
    def inputs(self) -> int:
        return len(self.prompt_ids) + len(self.response_ids) - 1

    def scored(self, teacher_logp: list[float]) -> Trajectory:
        return replace(self, teacher_logp=teacher_logp)


@dataclass(frozen=True)
class MicroBatch:
    """This rank's share of one packed micro-batch, on its device."""

    tokens: torch.Tensor  # [1, T] int64
    positions: torch.Tensor  # [1, T] int64, inside each sequence
    packed: PackedSeqParams
    segments: torch.Tensor  # [T] int64
    num_segments: int
    rows: torch.Tensor  # [N] int64: local positions that predict a response token
    targets: torch.Tensor  # [N] int64
    place: torch.Tensor  # [N] int64: t * 10 // T, the decile of the response
    owner: torch.Tensor  # [N] int64: Trajectory.index
    offset: torch.Tensor  # [N] int64: t
    denominator: torch.Tensor  # [N] fp32
    rollout_logp: torch.Tensor  # [N] fp32
    teacher_logp: torch.Tensor  # [N] fp32


def plan_microbatches(
    lengths: list[int], budget: int, dp: int, multiple_of: int
) -> list[list[list[int]]]:
    """Assign sequences to `dp` ranks x equally many micro-batches: [dp][micro-batch][sequence].

    Longest first into the emptiest micro-batch; as few as keep every one within `budget` tokens.
    Their number is a multiple of `multiple_of` (for the interleaved pipeline schedule).
    """
    longest = max(lengths)
    if longest > budget:
        raise RecipeError(
            f"a sequence of {longest} tokens exceeds train.microbatch_tokens={budget}; "
            f"raise it to at least {longest}."
        )
    count = -(-sum(lengths) // (budget * dp))
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    while True:
        count = -(-count // multiple_of) * multiple_of
        bins: list[list[int]] = [[] for _ in range(dp * count)]
        heap = [(0, b) for b in range(dp * count)]
        for i in order:
            load, b = heapq.heappop(heap)
            bins[b].append(i)
            heapq.heappush(heap, (load + lengths[i], b))
        if max(load for load, _ in heap) <= budget:
            return [bins[rank::dp] for rank in range(dp)]
        count += 1


def pack(
    samples: list[Trajectory], parallel: Parallel, budget: int, aggregation: str = "token_mean"
) -> tuple[list[MicroBatch], int]:
    """This rank's micro-batches and their common length in tokens before the context-parallel cut.

    Every micro-batch of every rank is padded to one length with a last segment that no loss reads,
    so that pipeline stages exchange tensors of one known shape.
    """
    layout = parallel.layout
    lengths = [round_up(sample.inputs, layout.token_multiple) for sample in samples]
    multiple = layout.pp if layout.vpp > 1 else 1
    plan = plan_microbatches(lengths, budget, parallel.dp.size, multiple)
    longest = max(sum(lengths[i] for i in b) for rank in plan for b in rank)
    total = round_up(longest, layout.microbatch_multiple)
    tokens = sum(len(sample.response_ids) for sample in samples)
    mine = plan[parallel.dp.rank]
    batches = [
        _build(
            [samples[i] for i in b],
            layout,
            parallel.cp.rank,
            total,
            aggregation,
            len(samples),
            tokens,
        )
        for b in mine
    ]
    return batches, total


def round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def _build(
    samples: list[Trajectory],
    layout: Layout,
    cp_rank: int,
    total: int,
    aggregation: str,
    responses: int,
    tokens: int,
) -> MicroBatch:
    lengths = [round_up(sample.inputs, layout.token_multiple) for sample in samples]
    if sum(lengths) < total:
        lengths.append(total - sum(lengths))  # padding: a last segment that no loss reads
    ids = numpy.zeros((7, total), dtype=numpy.int64)
    token, position, segment, is_loss, target, offset, owner = ids
    values = numpy.zeros((4, total), dtype=numpy.float32)
    rollout_logp, teacher_logp, denominator, response_length = values
    segment[:] = numpy.repeat(numpy.arange(len(lengths)), lengths)
    position[:] = numpy.concatenate([numpy.arange(length) for length in lengths])
    starts = [0, *accumulate(lengths)]
    for start, sample in zip(starts, samples, strict=False):
        prompt, response = len(sample.prompt_ids), len(sample.response_ids)
        loss = slice(start + prompt - 1, start + sample.inputs)
        token[start : start + sample.inputs] = (sample.prompt_ids + sample.response_ids)[:-1]
        is_loss[loss] = 1
        target[loss] = sample.response_ids
        offset[loss] = numpy.arange(response)
        owner[loss] = sample.index
        rollout_logp[loss] = sample.rollout_logp or 0
        teacher_logp[loss] = sample.teacher_logp or 0
        denominator[loss] = token_denominator(aggregation, response, responses, tokens)
        response_length[loss] = response
    index = zigzag_index(lengths, layout.cp, cp_rank)
    column, value = torch.from_numpy(ids)[:, index], torch.from_numpy(values)[:, index]
    rows = column[3].nonzero().squeeze(1)
    on = device.current_device()
    column, kept, value = column.to(on), column[:, rows].to(on), value[:, rows].to(on)
    return MicroBatch(
        tokens=column[0][None],
        positions=column[1][None],
        packed=packed_seq_params(lengths),
        segments=column[2],
        num_segments=len(lengths),
        rows=rows.to(on),
        targets=kept[4],
        place=kept[5] * 10 // value[3].long(),
        owner=kept[6],
        offset=kept[5],
        denominator=value[2],
        rollout_logp=value[0],
        teacher_logp=value[1],
    )
