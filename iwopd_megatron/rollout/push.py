"""Send new weights to rollout servers, bucket by bucket: by folder, by request, or by broadcast.

Only the trainer's rank 0 holds these; the weights it is given are one bucket at a time. Whatever
fails on one server is that server's loss, not the update's.
"""

from __future__ import annotations

import json
import shutil
import uuid
from collections.abc import Awaitable, Callable
from concurrent.futures import Future
from datetime import timedelta
from pathlib import Path
from typing import Protocol

import torch
import torch.distributed as dist
from safetensors.torch import save_file

from iwopd_megatron.rollout.pool import Place, Pool
from iwopd_megatron.rollout.server import NamedTensors, ServerLost, ServerRefused
from iwopd_megatron.runtime import device
from iwopd_megatron.runtime.background import Background
from iwopd_megatron.weights.convert import copy_companions


class Push(Protocol):
    """One way to send weights. Called in order, on rank 0 only."""

    def begin(self, places: list[Place], version: int) -> None: ...

    def send(self, tensors: NamedTensors) -> None: ...

    def end(self) -> list[Place]:
        """The servers that now hold all of it and label their answers with the version."""
        ...

    async def catch_up(self, place: Place) -> int | None:
        """Give one server alone the last version that was sent whole; None: it cannot be done."""
        ...

    def close(self) -> None:
        """Leave the servers as if there had been no updates; no-op when repeated."""
        ...


class Targets:
    """The servers of an update; those that fail drop out."""

    def __init__(self, loop: Background, pool: Pool):
        self.loop, self.pool = loop, pool
        self.places: list[Place] = []

    def each(self, call: Callable[[Place], Awaitable[None]]) -> Future[None]:
        """Start the call for all of them at once; the future ends when all have ended."""
        return self.loop.submit(self._each(call))

    async def _each(self, call: Callable[[Place], Awaitable[None]]) -> None:
        kept = await self.pool.on_each(list(self.places), call, "weight update failed: ")
        self.places = [place for place in self.places if place in kept]


class FolderPush:
    """Write a Hugging Face folder that all servers can read, then tell them to load it.

    The folder of a version appears whole, under its final name, or not at all; only the newest one
    is kept. A server that comes back alone takes it from there.
    """

    def __init__(self, targets: Targets, shared: Path, source: Path):
        self.targets, self.shared, self.source = targets, shared, source
        self.folder: Path | None = None

    def begin(self, places: list[Place], version: int) -> None:
        self.targets.places = list(places)
        self.version = version
        self.partial = self.shared / f"v{version}.partial"
        shutil.rmtree(self.partial, ignore_errors=True)
        self.partial.mkdir(parents=True)
        self.files: dict[str, str] = {}

    def send(self, tensors: NamedTensors) -> None:
        file = f"model-{len(set(self.files.values())):05d}.safetensors"
        whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors}
        save_file(whole, self.partial / file, metadata={"format": "pt"})
        self.files |= dict.fromkeys(whole, file)

    def end(self) -> list[Place]:
        index = {"metadata": {}, "weight_map": self.files}
        (self.partial / "model.safetensors.index.json").write_text(json.dumps(index))
        copy_companions(self.source, self.partial)
        self.folder = self.shared / f"v{self.version}"
        shutil.rmtree(self.folder, ignore_errors=True)
        self.partial.rename(self.folder)
        self.sent = self.version
        self.targets.each(self.catch_up).result()
        for old in self.shared.glob("v*"):
            if old != self.folder:
                shutil.rmtree(old, ignore_errors=True)
        return self.targets.places

    async def catch_up(self, place: Place) -> int | None:
        if self.folder is None:
            return None
        folder, version = self.folder, self.sent
        await place.server.load_folder(str(folder), version)
        return version

    def close(self) -> None:
        """The newest folder stays: servers may be started from it."""


class RequestPush:
    """Send the bytes in the requests themselves: needs nothing shared, and suits small models."""

    def __init__(self, targets: Targets):
        self.targets = targets

    def begin(self, places: list[Place], version: int) -> None:
        self.targets.places = list(places)
        self.version = version
        self.targets.each(lambda place: place.server.begin_update()).result()

    def send(self, tensors: NamedTensors) -> None:
        self.targets.each(lambda place: place.server.send(tensors)).result()

    def end(self) -> list[Place]:
        self.targets.each(lambda place: place.server.end_update(self.version)).result()
        return self.targets.places

    async def catch_up(self, place: Place) -> None:
        return None

    def close(self) -> None:
        """Nothing outlives an update."""


class BroadcastPush(RequestPush):
    """Broadcast over a process group of rank 0 and every rank of every server (NCCL; gloo on CPUs).

    The group lasts as long as the same servers do. A broadcast that breaks leaves every server of
    the group half updated, so all of them are given up.
    """

    def __init__(self, targets: Targets, address: str, timeout: timedelta = timedelta(minutes=10)):
        """address: of this machine, as the servers see it."""
        super().__init__(targets)
        self.address, self.timeout = address, timeout
        self.group: dist.ProcessGroup | None = None
        self.members: list[Place] = []
        self.name = ""

    def begin(self, places: list[Place], version: int) -> None:
        self.targets.places = list(places)
        if self.group is None or self.members != places:
            self.close()
            self.targets.places = list(places)
            try:
                self._join(places)
            except RuntimeError as error:  # a server did not come
                self._give_up(f"no process group: {error}")
        super().begin(self.targets.places, version)

    def _join(self, places: list[Place]) -> None:
        self.name, backend = f"weights-{uuid.uuid4().hex[:8]}", device.dist_backend()
        world = 1 + sum(place.server.tp for place in places)
        first = {}
        for place in places:
            first[place] = 1 + sum(p.server.tp for p in first)
        store = dist.TCPStore("0.0.0.0", 0, world, True, self.timeout, wait_for_workers=False)
        joined = self.targets.each(
            lambda place: place.server.join_group(
                self.address, store.port, first[place], world, self.name, backend
            )
        )
        self.group = _sending_group(store, world, self.name, backend, self.timeout)
        joined.result()
        self.members = list(places)

    def close(self) -> None:
        """Leave the group, on both sides: its threads last, and spin once the others are gone."""
        if self.group is None:
            return
        name, self.targets.places = self.name, self.members
        self.targets.each(lambda place: _leave(place, name)).result()
        self._forget()

    def _forget(self) -> None:
        if self.group is not None:
            dist.destroy_process_group(self.group)
        self.group, self.members = None, []

    def send(self, tensors: NamedTensors) -> None:
        if not self.targets.places:
            return
        flat = torch.cat([t.detach().contiguous().flatten().view(torch.uint8) for _, t in tensors])
        received = self.targets.each(lambda place: place.server.receive(tensors, self.name))
        try:
            dist.broadcast(flat, 0, group=self.group)
            device.synchronize()
        except RuntimeError as error:  # a member is gone
            self._give_up(f"the broadcast broke: {error}")
        received.result()
        if len(self.targets.places) < len(self.members):
            self._give_up("another server left the broadcast")

    def _give_up(self, reason: str) -> None:
        async def fail(place: Place) -> None:
            raise ServerLost(reason)

        self.targets.each(fail).result()
        self._forget()


async def _leave(place: Place, group: str) -> None:
    try:
        await place.server.leave_group(group)
    except (ServerLost, ServerRefused):  # a restarted server was never in it
        pass


def _sending_group(
    store: dist.Store, world: int, name: str, backend: str, timeout: timedelta
) -> dist.ProcessGroup:
    """Rank 0 of a group outside this process's own world, made the way the engines make it."""
    from torch.distributed import distributed_c10d as c10d

    group, _ = c10d._new_process_group_helper(
        world,
        0,
        [],
        c10d.Backend(backend),
        c10d.PrefixStore(name, store),
        group_name=name,
        timeout=timeout,
    )
    c10d._world.pg_group_ranks[group] = {i: i for i in range(world)}
    return group
