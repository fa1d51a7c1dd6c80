"""Process groups of a run, and the zigzag context-parallel layout.

Axes: tp tensor, pp pipeline, vpp virtual pipeline, ep expert, etp expert-tensor, cp context, dp
data. `initialise()` is the only place that builds Megatron's process groups; the rest of the
package reads them from the `Parallel` it returns.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist

from iwopd_megatron.config.models import Layout
from iwopd_megatron.runtime import device
from iwopd_megatron.runtime.megatron import PackedSeqParams, model_parallel_cuda_manual_seed, mpu

Group = dist.ProcessGroup


@dataclass(frozen=True)
class Axis:
    """One mesh axis: its process group, this rank's place and the number of places."""

    group: Group
    rank: int
    size: int


@dataclass(frozen=True)
class Parallel:
    """The mesh as this rank sees it. `dp_cp` and `expert_model` (ep x etp) are products of axes."""

    layout: Layout
    tp: Axis
    pp: Axis
    cp: Axis
    dp: Axis
    ep: Axis
    etp: Axis
    dp_cp: Axis
    expert_model: Axis
    is_last_stage: bool
    control: Group | None = None  # gloo, patient: rank 0 may wait an hour for other services

    @property
    def rank(self) -> int:
        """Return this process's rank in the world."""
        return dist.get_rank()

    @property
    def world(self) -> int:
        """Return the number of processes."""
        return dist.get_world_size()

    @property
    def is_main(self) -> bool:
        """Return whether this is rank 0."""
        return self.rank == 0

    def on_main(self, function: Callable[[], Any]) -> Any:
        """Call `function` on rank 0; return its value, or raise its exception, on all. Collective.

        Values are pickled.
        """
        outcome: list[Any] = [None, None]
        if self.is_main:
            try:
                outcome[0] = function()
            except Exception as error:
                outcome[1] = error
        dist.broadcast_object_list(outcome, 0, group=self.control)
        if outcome[1] is not None:
            raise outcome[1]
        return outcome[0]


def initialise(layout: Layout, seed: int = 0, timeout_minutes: float = 30) -> Parallel:
    """Join the world of torchrun's variables; return it cut along the axes of `layout`."""
    if not dist.is_initialized():
        device.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group(device.dist_backend(), timeout=timedelta(minutes=timeout_minutes))
    mpu.destroy_model_parallel()
    mpu.initialize_model_parallel(
        layout.tp,
        layout.pp,
        layout.vpp if layout.vpp > 1 else None,
        context_parallel_size=layout.cp,
        expert_model_parallel_size=layout.ep,
        expert_tensor_parallel_size=layout.etp,
        create_gloo_process_groups=True,
    )
    model_parallel_cuda_manual_seed(seed)
    return Parallel(
        layout=layout,
        tp=_axis(mpu.get_tensor_model_parallel_group()),
        pp=_axis(mpu.get_pipeline_model_parallel_group()),
        cp=_axis(mpu.get_context_parallel_group()),
        dp=_axis(mpu.get_data_parallel_group()),
        ep=_axis(mpu.get_expert_model_parallel_group()),
        etp=_axis(mpu.get_expert_tensor_parallel_group()),
        dp_cp=_axis(mpu.get_data_parallel_group(with_context_parallel=True)),
        expert_model=_axis(mpu.get_expert_tensor_and_model_parallel_group()),
        is_last_stage=mpu.is_pipeline_last_stage(ignore_virtual=True),
        control=dist.new_group(backend="gloo", timeout=timedelta(days=1)),
    )


def _axis(group: Group) -> Axis:
    return Axis(group, group.rank(), group.size())


def shutdown() -> None:
    """Leave the world together; every rank calls it.

    The first process to end ends the others, so what they have to say comes before.
    """
    dist.barrier()
    mpu.destroy_model_parallel()
    dist.destroy_process_group()


def any_rank(flag: bool) -> bool:
    """Return whether `flag` is set on any rank. One all-reduce of one number."""
    tensor = torch.tensor([int(flag)], device=device.current_device())
    dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return bool(tensor.item())


def gather(value: Any) -> list[Any]:
    """Return every rank's `value`, on every rank. One all-gather of pickled objects."""
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def zigzag_index(lengths: list[int], size: int, rank: int) -> torch.Tensor:
    """Return positions in the packed stream that context rank `rank` of `size` holds, int64 on CPU.

    Every sequence (length a multiple of 2*size) is cut into 2*size chunks; a rank holds `rank` and
    `2*size-1-rank`, which balances causal attention. Megatron cuts THD batches the same way.
    """
    if size == 1:
        return torch.arange(sum(lengths))
    parts, start = [], 0
    for length in lengths:
        chunk = length // (2 * size)
        for position in (rank, 2 * size - 1 - rank):
            parts.append(torch.arange(chunk) + start + position * chunk)
        start += length
    return torch.cat(parts)


class Packing:
    """Index tensors of sequences packed back to back, on the device: made once, read by all layers.

    Shapes: S sequences, L the longest, T tokens.
    """

    def __init__(self, lengths: list[int]):
        self.lengths = lengths  # on the host: reading cu_seqlens would wait for the device
        self._context_order: torch.Tensor | None = None

    @cached_property
    def padded(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the token at each place of a right-padded `[S * L]` batch, and each token's place.

        Padding repeats whatever token comes next, spread out and never read.
        """
        longest, total = max(self.lengths), sum(self.lengths)
        lengths_S = torch.tensor(self.lengths)
        start_S = lengths_S.cumsum(0) - lengths_S
        token_SL = (start_S[:, None] + torch.arange(longest)).clamp(max=total - 1)
        shift_S = torch.arange(len(self.lengths)) * longest - start_S
        place_T = torch.arange(total) + shift_S.repeat_interleave(lengths_S)
        on = device.current_device()
        return token_SL.flatten().to(on), place_T.to(on)

    def context_order(self, size: int) -> torch.Tensor:
        """Return where each token `[T]` is when the shards of all context ranks are joined."""
        if self._context_order is None:
            shards = [zigzag_index(self.lengths, size, rank) for rank in range(size)]
            self._context_order = torch.cat(shards).argsort().to(device.current_device())
        return self._context_order


def packed_seq_params(lengths: list[int]) -> PackedSeqParams:
    """Return Megatron's description of packed sequences of these lengths, before the CP cut.

    With a `packing` of them, which native attention reads.
    """
    bounds = torch.tensor([0, *lengths]).cumsum(0).to(device.current_device(), torch.int32)
    params = PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=bounds,
        cu_seqlens_kv=bounds,
        max_seqlen_q=max(lengths),
        max_seqlen_kv=max(lengths),
    )
    params.packing = Packing(lengths)
    return params
