"""Several rollout servers as one: a prompt goes to the least loaded, and is answered once.

A server that dies, hangs or answers nonsense loses its prompts to the others and is brought back;
only servers that hold the wanted weight version get prompts, and an answer under another
version is thrown away. Lives in one event loop on the trainer's rank 0.
"""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from iwopd_megatron.batch.trajectory import Trajectory
from iwopd_megatron.errors import UserError
from iwopd_megatron.rollout.engine import Prompt, Sampling
from iwopd_megatron.rollout.server import Answer, RolloutServer, ServerLost, ServerRefused
from iwopd_megatron.runtime.services import Server

WATCH_SECONDS = 2.0  # between looks at servers that work
MISSED_LOOKS = 2  # a server that does not answer so often in a row hangs
MAX_TRIES = 8  # of one prompt


class NoServer(Exception):
    """No server holds the wanted weights and none is coming back with them: push them again."""


@dataclass(eq=False)
class Place:
    """One server as the pool sees it."""

    server: RolloutServer
    own: Server | None = None  # its process, which its keeper starts again; None: it is not ours
    process: subprocess.Popen | None = None  # of its own, the one that became ready
    version: int | None = None  # of the weights it holds; None: unknown, or half updated
    is_up: bool = True
    running: set[asyncio.Task] = field(default_factory=set)

    async def wait_ready(self) -> None:
        """As the server's; remembers which process it was."""
        await self.server.wait_ready()
        if self.own is not None:
            self.process = self.own.process


class Pool:
    """Rollout servers that hold, or are to hold, weight version `version`."""

    def __init__(
        self,
        places: list[Place],
        max_running: int,
        eos_ids: set[int],
        say: Callable[[str], None],
    ):
        """max_running: requests in flight a server; say: tells people what happened."""
        self.places, self.max_running, self.eos_ids, self.say = places, max_running, eos_ids, say
        self.version = -1
        self.max_staleness = 0
        self.updating = False
        self.catch_up: Callable[[Place], Awaitable[int | None]] | None = None
        self.changed = asyncio.Condition()
        self.revivals: set[asyncio.Task] = set()

    @property
    def live(self) -> list[Place]:
        return [place for place in self.places if place.is_up]

    async def collect(
        self, prompts: list[Prompt], sampling: Sampling, keep: Callable[[Trajectory], None]
    ) -> None:
        """Give `keep` one answer a prompt as each ends. NoServer: some may be missing."""
        watch = asyncio.create_task(self._watch())
        tasks = [asyncio.create_task(self._answer(prompt, sampling)) for prompt in prompts]
        try:
            for done in asyncio.as_completed(tasks):
                keep(await done)
        finally:
            for task in [watch, *tasks]:
                task.cancel()
            await asyncio.gather(watch, *tasks, return_exceptions=True)

    async def _answer(self, prompt: Prompt, sampling: Sampling) -> Trajectory:
        """One whole answer; what an aborted request had written is kept and continued."""
        whole = Answer([], [], "abort")
        failure = ""
        for _ in range(MAX_TRIES):
            place = await self._acquire()
            try:
                part = await self._ask(place, prompt, sampling, whole)
            except ServerLost as error:
                failure = str(error)
                await self._suspect(place, failure)
                continue
            if not self._is_current(part):
                failure = f"{place.server.url} answered under weights {sorted(set(part.versions))}"
                await self.lose(place, f"{failure}, not {self.version}", is_dead=False)
                continue
            whole = whole.then(part)
            if whole.finish != "abort":
                return self._trajectory(prompt, whole)
        raise UserError(f"prompt {prompt.index} failed {MAX_TRIES} times, at last: {failure}.")

    async def _ask(
        self, place: Place, prompt: Prompt, sampling: Sampling, so_far: Answer
    ) -> Answer:
        """The rest of an answer from one server; ServerLost if the server is given up meanwhile."""
        task = asyncio.create_task(
            place.server.generate(prompt.ids + so_far.ids, sampling.rest(prompt, len(so_far.ids)))
        )
        place.running.add(task)
        try:
            await asyncio.wait([task])
            if task.cancelled():
                raise ServerLost(f"{place.server.url} was given up")
            return task.result()
        finally:
            task.cancel()
            place.running.discard(task)
            await self._notify()

    def _is_current(self, answer: Answer) -> bool:
        oldest = self.version - self.max_staleness
        return all(v.isdigit() and oldest <= int(v) <= self.version for v in answer.versions)

    def _trajectory(self, prompt: Prompt, answer: Answer) -> Trajectory:
        return Trajectory(
            index=prompt.index,
            prompt_ids=prompt.ids,
            response_ids=answer.ids,
            rollout_logp=answer.logp,
            truncated=answer.ids[-1] not in self.eos_ids,
            weight_version=min(map(int, answer.versions)),
            source=prompt.source,
            experts=answer.experts,
        )

    async def _acquire(self) -> Place:
        async with self.changed:
            while True:
                current = [p for p in self.places if p.is_up and p.version == self.version]
                ready = [p for p in current if len(p.running) < self.max_running]
                if ready:
                    return min(ready, key=lambda place: len(place.running))
                if not current and not self.updating and not self.revivals:
                    raise NoServer
                await self.changed.wait()

    async def _notify(self) -> None:
        async with self.changed:
            self.changed.notify_all()

    async def _suspect(self, place: Place, reason: str) -> None:
        """A request failed: the server is lost unless it still answers."""
        for _ in range(MISSED_LOOKS):
            if not place.is_up or await place.server.is_alive():
                return
        await self.lose(place, reason)

    async def _watch(self) -> None:
        missed = dict.fromkeys(self.places, 0)
        while True:
            await asyncio.sleep(WATCH_SECONDS)
            working = [place for place in self.live if place.running]
            alive = await asyncio.gather(*(place.server.is_alive() for place in working))
            for place, is_alive in zip(working, alive, strict=True):
                missed[place] = 0 if is_alive else missed[place] + 1
                if missed[place] >= MISSED_LOOKS:
                    missed[place] = 0
                    await self.lose(place, f"{place.server.url} does not answer")

    async def lose(self, place: Place, reason: str, is_dead: bool = True) -> None:
        """Take a server out, give its prompts back, and start to bring it back.

        is_dead: it is killed, if it is ours, and its keeper starts it again.
        """
        if not place.is_up:
            return
        place.is_up, place.version = False, None
        self.say(f"rollout server lost: {reason}")
        for task in list(place.running):
            task.cancel()
        revival = asyncio.create_task(self._revive(place, is_dead))
        self.revivals.add(revival)
        await self._notify()

    async def _revive(self, place: Place, is_dead: bool) -> None:
        """Wait until it is ready again, and give it the weights if that can be done alone."""
        try:
            if is_dead and place.own is not None:
                place.own.kill(only=place.process)
            else:  # an update may have left it paused, and then it never seems ready
                with contextlib.suppress(ServerLost, ServerRefused):
                    await place.server.resume()
            await place.wait_ready()
            if self.catch_up is not None:
                place.version = await self.catch_up(place)
            place.is_up = True
            self.say(f"rollout server {place.server.url} is back")
        except (ServerLost, ServerRefused, UserError) as error:
            self.say(f"{place.server.url} does not come back: {error}")
        finally:
            self.revivals.discard(asyncio.current_task())
            await self._notify()

    async def settle(self) -> None:
        """Wait until no server is on its way back."""
        while self.revivals:
            await asyncio.gather(*self.revivals, return_exceptions=True)

    async def begin_update(self, version: int) -> list[Place]:
        """Pause the servers that lack this version; what runs on them goes on under it later."""
        self.version, self.updating = version, True
        while not self.live and self.revivals:
            await self.settle()
        places = [place for place in self.live if place.version != version]
        for place in places:
            place.version = None
        await self.on_each(places, lambda place: place.server.pause())
        return [place for place in places if place.is_up]

    async def end_update(self) -> None:
        """Let all servers go on."""
        await self.on_each(self.live, lambda place: place.server.resume())
        self.updating = False
        await self._notify()

    async def on_each(
        self, places: list[Place], call: Callable[[Place], Awaitable[None]], what: str = ""
    ) -> list[Place]:
        """Call for all of them at once; those for which it did not fail. The others are lost.

        what: goes before the reason that people are told.
        """
        results = await asyncio.gather(*map(call, places), return_exceptions=True)
        kept = []
        for place, result in zip(places, results, strict=True):
            if isinstance(result, ServerLost | ServerRefused):
                await self.lose(place, f"{what}{result}")
            elif isinstance(result, BaseException):
                raise result
            else:
                kept.append(place)
        return kept
