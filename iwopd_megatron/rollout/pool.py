"""All rollout servers as one pool: who is up, which weights each holds, who takes the next prompt.

Only servers that hold the wanted weight version get prompts; one that is lost is brought back.
`retry.py` asks them. Lives in one event loop on the trainer's rank 0.
"""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

from iwopd_megatron.batch.trajectory import Trajectory
from iwopd_megatron.errors import UserError
from iwopd_megatron.rollout.engine import Prompt
from iwopd_megatron.rollout.server import Completion, RolloutServer, ServerLost, ServerRefused
from iwopd_megatron.runtime.services import Server


class NoServer(Exception):
    """No server holds the wanted weights and none is coming back with them: push them again."""


@dataclass(eq=False)
class Replica:
    """One server of the pool, and what the pool knows of it."""

    server: RolloutServer
    own: Server | None = None  # its process, which its keeper starts again; None: it is not ours
    process: subprocess.Popen | None = None  # of its own, the one that became ready
    version: int | None = None  # of the weights it holds; None: unknown, or half updated
    is_up: bool = True
    running: set[asyncio.Task[Completion]] = field(default_factory=set)

    async def wait_ready(self) -> None:
        """As the server's `wait_ready`; remembers which process became ready."""
        await self.server.wait_ready()
        if self.own is not None:
            self.process = self.own.process


async def no_catch_up(replica: Replica) -> int | None:
    """Return None: a server that comes back alone waits for the next push."""
    return None


class ServerPool:
    """Rollout servers that hold, or are to hold, weight version `version`."""

    def __init__(
        self,
        replicas: list[Replica],
        max_running: int,
        eos_ids: set[int],
        say: Callable[[str], None],
        max_staleness: int = 0,
        catch_up: Callable[[Replica], Awaitable[int | None]] = no_catch_up,
    ):
        """max_running: requests in flight a server; say: tells people what happened.

        max_staleness: versions by which an answer's tokens may be older than the pool's.
        catch_up: gives a server that is back the weights and returns their version; None: it could
        not.
        """
        self.replicas, self.max_running, self.eos_ids = replicas, max_running, eos_ids
        self.say, self.max_staleness, self.catch_up = say, max_staleness, catch_up
        self.version = -1
        self.updating = False
        self.changed = asyncio.Condition()
        self.revivals: set[asyncio.Task[None]] = set()

    @property
    def live(self) -> list[Replica]:
        """The servers that are up."""
        return [replica for replica in self.replicas if replica.is_up]

    def is_current(self, completion: Completion) -> bool:
        """Return whether every token was written under weights that are new enough."""
        oldest = self.version - self.max_staleness
        return all(v.isdigit() and oldest <= int(v) <= self.version for v in completion.versions)

    def trajectory(self, prompt: Prompt, completion: Completion) -> Trajectory:
        """Return a whole answer as a sample; its weight version is that of its oldest token."""
        return Trajectory(
            index=prompt.index,
            prompt_ids=prompt.ids,
            response_ids=completion.ids,
            rollout_logp=completion.logp,
            truncated=completion.ids[-1] not in self.eos_ids,
            weight_version=min(map(int, completion.versions)),
            source=prompt.source,
            experts=completion.experts,
        )

    async def acquire(self) -> Replica:
        """Return the least loaded server that holds the weights, once one has room.

        NoServer if there is none and none is on its way.
        """
        async with self.changed:
            while True:
                current = [r for r in self.replicas if r.is_up and r.version == self.version]
                ready = [r for r in current if len(r.running) < self.max_running]
                if ready:
                    return min(ready, key=lambda replica: len(replica.running))
                if not current and not self.updating and not self.revivals:
                    raise NoServer
                await self.changed.wait()

    async def notify(self) -> None:
        """Let those who wait in `acquire` look again."""
        async with self.changed:
            self.changed.notify_all()

    async def lose(self, replica: Replica, reason: str, is_dead: bool = True) -> None:
        """Take a server out, give its prompts back, and start to bring it back.

        is_dead: it is killed, if it is ours, and its keeper starts it again.
        """
        if not replica.is_up:
            return
        replica.is_up, replica.version = False, None
        self.say(f"rollout server lost: {reason}")
        for task in list(replica.running):
            task.cancel()
        revival = asyncio.create_task(self._revive(replica, is_dead))
        self.revivals.add(revival)
        await self.notify()

    async def _revive(self, replica: Replica, is_dead: bool) -> None:
        """Wait until it is ready again, and give it the weights if that can be done alone."""
        try:
            if is_dead and replica.own is not None:
                replica.own.kill(only=replica.process)
            else:  # an update may have left it paused, and then it never seems ready
                with contextlib.suppress(ServerLost, ServerRefused):
                    await replica.server.resume()
            await replica.wait_ready()
            replica.version = await self.catch_up(replica)
            replica.is_up = True
            self.say(f"rollout server {replica.server.url} is back")
        except (ServerLost, ServerRefused, UserError) as error:
            self.say(f"{replica.server.url} does not come back: {error}")
        finally:
            self.revivals.discard(asyncio.current_task())
            await self.notify()

    async def settle(self) -> None:
        """Wait until no server is on its way back."""
        while self.revivals:
            await asyncio.gather(*self.revivals, return_exceptions=True)

    async def begin_update(self, version: int) -> list[Replica]:
        """Pause the servers that lack this version, and return them.

        What runs on them goes on under the new weights later.
        """
        self.version, self.updating = version, True
        while not self.live and self.revivals:
            await self.settle()
        replicas = [replica for replica in self.live if replica.version != version]
        for replica in replicas:
            replica.version = None
        await self.on_each(replicas, lambda replica: replica.server.pause())
        return [replica for replica in replicas if replica.is_up]

    async def end_update(self) -> None:
        """Let all servers go on."""
        await self.on_each(self.live, lambda replica: replica.server.resume())
        self.updating = False
        await self.notify()

    async def on_each(
        self, replicas: list[Replica], call: Callable[[Replica], Awaitable[Any]], what: str = ""
    ) -> list[Replica]:
        """Call for all of them at once; return those for which it did not fail, lose the others.

        what: goes before the reason that people are told.
        """
        results = await asyncio.gather(*map(call, replicas), return_exceptions=True)
        kept = []
        for replica, result in zip(replicas, results, strict=True):
            if isinstance(result, ServerLost | ServerRefused):
                await self.lose(replica, f"{what}{result}")
            elif isinstance(result, BaseException):
                raise result
            else:
                kept.append(replica)
        return kept
