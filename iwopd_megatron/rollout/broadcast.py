"""Send new weights to rollout servers by broadcast, over a process group with rank 0."""

from __future__ import annotations

import uuid
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, cast

import torch
import torch.distributed as dist

from iwopd_megatron.rollout.pool import Replica
from iwopd_megatron.rollout.push import RequestPush, Targets
from iwopd_megatron.rollout.server import NamedTensors, ServerLost, ServerRefused
from iwopd_megatron.runtime import device

if TYPE_CHECKING:
    from torch.distributed.distributed_c10d import GroupName


@dataclass(frozen=True)
class _Joined:
    """A process group of rank 0 and every rank of some servers."""

    group: dist.ProcessGroup
    name: str
    members: list[Replica]


class BroadcastPush(RequestPush):
    """Broadcast over a process group of rank 0 and every rank of every server (NCCL; gloo on CPUs).

    The group lasts as long as the same servers do. A broadcast that breaks leaves every server of
    the group half updated, so all of them are given up.
    """

    def __init__(self, address: str, timeout: timedelta = timedelta(minutes=10)):
        """address: of this machine, as the servers see it; timeout: of joining and broadcasts."""
        self.address, self.timeout = address, timeout
        self.joined: _Joined | None = None

    def begin(self, targets: Targets, version: int) -> None:
        """Make a group unless there is one of these very servers; have them get ready."""
        self.targets = targets
        if self.joined is None or self.joined.members != targets.replicas:
            self.close()
            try:
                self.joined = self._join()
            except RuntimeError as error:  # a server did not come
                self._give_up(f"no process group: {error}")
        super().begin(targets, version)

    def _join(self) -> _Joined:
        members = list(self.targets.replicas)
        name, backend = f"weights-{uuid.uuid4().hex[:8]}", device.dist_backend()
        world = 1 + sum(replica.server.tp for replica in members)
        first: dict[Replica, int] = {}
        for replica in members:
            first[replica] = 1 + sum(earlier.server.tp for earlier in first)
        store = dist.TCPStore("0.0.0.0", 0, world, True, self.timeout, wait_for_workers=False)
        joining = self.targets.each(
            lambda replica: replica.server.join_group(
                self.address, store.port, first[replica], world, name, backend
            )
        )
        group = _sending_group(store, world, name, backend, self.timeout)
        joining.result()
        return _Joined(group, name, members)

    def close(self) -> None:
        """Leave the group, on both sides: its threads last, and spin once the others are gone."""
        if self.joined is None:
            return
        joined, targets = self.joined, self.targets
        members = Targets(targets.loop, targets.pool, joined.members)
        members.each(lambda replica: _leave(replica, joined.name)).result()
        self._forget()

    def _forget(self) -> None:
        if self.joined is not None:
            dist.destroy_process_group(self.joined.group)
        self.joined = None

    def send(self, tensors: NamedTensors) -> None:
        """Broadcast a bucket, as one run of bytes."""
        if self.joined is None or not self.targets.replicas:
            return
        joined = self.joined
        flat = as_bytes(tensors)
        received = self.targets.each(lambda replica: replica.server.receive(tensors, joined.name))
        try:
            dist.broadcast(flat, 0, group=joined.group)
            device.synchronize()
        except RuntimeError as error:  # a member is gone
            self._give_up(f"the broadcast broke: {error}")
        received.result()
        if len(self.targets.replicas) < len(joined.members):
            self._give_up("another server left the broadcast")

    def _give_up(self, reason: str) -> None:
        async def fail(replica: Replica) -> None:
            raise ServerLost(reason)

        self.targets.each(fail).result()
        self._forget()


def as_bytes(tensors: NamedTensors) -> torch.Tensor:
    """Return a bucket's tensors as one run of bytes, uint8, in their order."""
    return torch.cat([t.detach().contiguous().flatten().view(torch.uint8) for _, t in tensors])


async def _leave(replica: Replica, group: str) -> None:
    try:
        await replica.server.leave_group(group)
    except (ServerLost, ServerRefused):  # a restarted server was never in it
        pass


def _sending_group(
    store: dist.Store, world: int, name: str, backend: str, timeout: timedelta
) -> dist.ProcessGroup:
    """Join as rank 0 a group outside this process's world, made the way the engines make it."""
    from torch.distributed import distributed_c10d as c10d

    group, _ = c10d._new_process_group_helper(
        world,
        0,
        [],
        c10d.Backend(backend),
        c10d.PrefixStore(name, store),
        group_name=cast("GroupName", name),  # a NewType of str that older torch lacks
        timeout=timeout,
    )
    c10d._world.pg_group_ranks[group] = {i: i for i in range(world)}
    return group
