"""Send new weights to rollout servers, bucket by bucket: by folder or by request.

`broadcast.py` has the third way. Only the trainer's rank 0 has a `Push`. What fails on one
server loses that server and not the update: `controller.py` has it brought back.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Awaitable, Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Protocol

from safetensors.torch import save_file

from iwopd_megatron.hf.companions import copy_companions
from iwopd_megatron.rollout.pool import Replica, ServerPool
from iwopd_megatron.rollout.server import NamedTensors
from iwopd_megatron.runtime.background import Background


class Targets:
    """The servers of one update; those that fail drop out, and the pool brings them back."""

    def __init__(self, loop: Background, pool: ServerPool, replicas: list[Replica]):
        """loop: where the pool lives; replicas: paused, and without the update's weights."""
        self.loop, self.pool = loop, pool
        self.replicas = list(replicas)

    def each(self, call: Callable[[Replica], Awaitable[Any]]) -> Future[None]:
        """Start the call for all of them at once; the future ends when all have ended."""
        return self.loop.submit(self._each(call))

    async def _each(self, call: Callable[[Replica], Awaitable[Any]]) -> None:
        kept = await self.pool.on_each(list(self.replicas), call, "weight update failed: ")
        self.replicas = [replica for replica in self.replicas if replica in kept]


class Push(Protocol):
    """One way to send weights. Called in the order begin, send, ..., end, on rank 0 only."""

    def begin(self, targets: Targets, version: int) -> None:
        """Get ready to send weight version `version` to these servers."""
        ...

    def send(self, tensors: NamedTensors) -> None:
        """Send one bucket of whole tensors under their Hugging Face names."""
        ...

    def end(self) -> list[Replica]:
        """Return the servers that now hold all of it and label their answers with the version."""
        ...

    async def catch_up(self, replica: Replica) -> int | None:
        """Give one server alone the last version that was sent whole, and return that version.

        None: it cannot be done. Runs in the pool's event loop.
        """
        ...

    def close(self) -> None:
        """Leave the servers as if there had been no updates; no-op when repeated."""
        ...


class FolderPush:
    """Write a Hugging Face folder that all servers can read, then tell them to load it.

    The folder of a version appears whole, under its final name, or not at all; only the newest one
    is kept. A server that comes back alone takes it from there.
    """

    def __init__(self, shared: Path, source: Path):
        """shared: where the folders go; source: the folder whose companion files they get."""
        self.shared, self.source = shared, source
        self.sent: tuple[Path, int] | None = None  # the newest folder and its version

    def begin(self, targets: Targets, version: int) -> None:
        """Make the version's folder, under a name that nobody looks for yet."""
        self.targets, self.version = targets, version
        self.partial = self.shared / f"v{version}.partial"
        shutil.rmtree(self.partial, ignore_errors=True)
        self.partial.mkdir(parents=True)
        self.files: dict[str, str] = {}

    def send(self, tensors: NamedTensors) -> None:
        """Write a bucket as one safetensors file."""
        file = f"model-{len(set(self.files.values())):05d}.safetensors"
        whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors}
        save_file(whole, self.partial / file, metadata={"format": "pt"})
        self.files |= dict.fromkeys(whole, file)

    def end(self) -> list[Replica]:
        """Complete the folder, have it loaded, and return the servers that did."""
        index = {"metadata": {}, "weight_map": self.files}
        (self.partial / "model.safetensors.index.json").write_text(json.dumps(index))
        copy_companions(self.source, self.partial)
        folder = self.shared / f"v{self.version}"
        shutil.rmtree(folder, ignore_errors=True)
        self.partial.rename(folder)
        self.sent = folder, self.version
        self.targets.each(self.catch_up).result()
        for old in self.shared.glob("v*"):
            if old != folder:
                shutil.rmtree(old, ignore_errors=True)
        return self.targets.replicas

    async def catch_up(self, replica: Replica) -> int | None:
        """Have one server load the newest folder; None before there is one."""
        if self.sent is None:
            return None
        folder, version = self.sent
        await replica.server.load_folder(str(folder), version)
        return version

    def close(self) -> None:
        """Do nothing: the newest folder stays, for servers may be started from it."""


class RequestPush:
    """Send the bytes in the requests themselves: needs nothing shared, and suits small models."""

    def begin(self, targets: Targets, version: int) -> None:
        """Have the servers get ready."""
        self.targets, self.version = targets, version
        self.targets.each(lambda replica: replica.server.begin_update()).result()

    def send(self, tensors: NamedTensors) -> None:
        """Send a bucket to every server at once."""
        self.targets.each(lambda replica: replica.server.send(tensors)).result()

    def end(self) -> list[Replica]:
        """Have the servers use what they got, and return those that do."""
        self.targets.each(lambda replica: replica.server.end_update(self.version)).result()
        return self.targets.replicas

    async def catch_up(self, replica: Replica) -> int | None:
        """Return None: nothing is kept of what was sent."""
        return None

    def close(self) -> None:
        """Do nothing: nothing outlives an update."""
