"""Being rank r of N alone: the real process groups, of which nobody else is there."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from unittest import mock

import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from iwopd_megatron.config.models import Layout
from iwopd_megatron.runtime import parallel
from iwopd_megatron.runtime.parallel import Parallel


@dataclass
class Groups:
    """All process groups of a world by what they are for: axis -> the ranks of each group."""

    by_axis: dict[str, list[tuple[int, ...]]] = field(default_factory=dict)


@contextlib.contextmanager
def alone(rank: int, size: int, layout: Layout, groups: Groups | None = None) -> Iterator[Parallel]:
    """Be `rank` of `size` processes in this layout; leave that world at the end.

    groups: takes all groups that Megatron makes. Collectives must not be run by torch: see
    `collectives.Recorder`.
    """
    if dist.is_initialized():
        raise RuntimeError("this process is in a world already; rehearse in one of its own.")
    dist.init_process_group("fake", rank=rank, world_size=size, store=FakeStore())
    with _groups_of_one(groups):
        here = parallel.initialise(layout)
    try:
        yield here
    finally:
        parallel.mpu.destroy_model_parallel()
        dist.destroy_process_group()


@contextlib.contextmanager
def _groups_of_one(groups: Groups | None) -> Iterator[None]:
    """Have every new group be one that needs no other process, whatever backend is asked for."""
    make = dist.new_group

    def new_group(ranks=None, timeout=None, backend=None, group_desc=None, **_):
        if groups is not None and ranks is not None:
            groups.by_axis.setdefault(group_desc or "", []).append(tuple(ranks))
        return make(ranks, backend="fake", group_desc=group_desc)

    with mock.patch.object(dist, "new_group", new_group):
        yield
