"""Retry of prompts: what a rollout server did not answer, or not rightly, is asked of another one.

A server that dies, hangs, cuts off or answers under another weight version loses its prompts to the
others and is brought back (`pool.py`). Every prompt is answered once, and what an aborted request
had written is kept. All of it runs in the pool's event loop.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from iwopd_megatron.batch.trajectory import Trajectory
from iwopd_megatron.errors import UserError
from iwopd_megatron.rollout.engine import Prompt, Sampling
from iwopd_megatron.rollout.pool import Replica, ServerPool
from iwopd_megatron.rollout.server import Completion, ServerLost

WATCH_SECONDS = 2.0  # between looks at servers that work
MISSED_LOOKS = 2  # a server that does not answer so often in a row hangs
MAX_TRIES = 8  # of one prompt


async def collect(
    pool: ServerPool,
    prompts: list[Prompt],
    sampling: Sampling,
    keep: Callable[[Trajectory], None],
) -> None:
    """Give `keep` one answer a prompt as each ends.

    NoServer: some may be missing, for no server holds the weights any more. UserError: a prompt
    failed MAX_TRIES times.
    """
    watch = asyncio.create_task(_watch(pool))
    tasks = [asyncio.create_task(_answer(pool, prompt, sampling)) for prompt in prompts]
    try:
        for done in asyncio.as_completed(tasks):
            keep(await done)
    finally:
        for task in [watch, *tasks]:
            task.cancel()
        await asyncio.gather(watch, *tasks, return_exceptions=True)


async def _answer(pool: ServerPool, prompt: Prompt, sampling: Sampling) -> Trajectory:
    """Return one whole answer, asking as many servers as it takes."""
    whole = Completion([], [], "abort")
    failure = ""
    for _ in range(MAX_TRIES):
        replica = await pool.acquire()
        try:
            part = await _ask(pool, replica, prompt, sampling, whole)
        except ServerLost as error:
            failure = str(error)
            await _suspect(pool, replica, failure)
            continue
        if not pool.is_current(part):
            failure = f"{replica.server.url} answered under weights {sorted(set(part.versions))}"
            await pool.lose(replica, f"{failure}, not {pool.version}", is_dead=False)
            continue
        whole = whole.then(part)
        if whole.finish != "abort":
            return pool.trajectory(prompt, whole)
    raise UserError(f"prompt {prompt.index} failed {MAX_TRIES} times, at last: {failure}.")


async def _ask(
    pool: ServerPool, replica: Replica, prompt: Prompt, sampling: Sampling, so_far: Completion
) -> Completion:
    """Return the rest of an answer from one server; ServerLost if it is given up meanwhile."""
    task = asyncio.create_task(
        replica.server.generate(prompt.ids + so_far.ids, sampling.rest(prompt, len(so_far.ids)))
    )
    replica.running.add(task)
    try:
        await asyncio.wait([task])
        if task.cancelled():
            raise ServerLost(f"{replica.server.url} was given up")
        return task.result()
    finally:
        task.cancel()
        replica.running.discard(task)
        await pool.notify()


async def _suspect(pool: ServerPool, replica: Replica, reason: str) -> None:
    """Take a server whose request failed for lost, unless it still answers."""
    for _ in range(MISSED_LOOKS):
        if not replica.is_up or await replica.server.is_alive():
            return
    await pool.lose(replica, reason)


async def _watch(pool: ServerPool) -> None:
    """Look for servers that hang while requests run on them; without an end."""
    missed = dict.fromkeys(pool.replicas, 0)
    while True:
        await asyncio.sleep(WATCH_SECONDS)
        working = [replica for replica in pool.live if replica.running]
        alive = await asyncio.gather(*(replica.server.is_alive() for replica in working))
        for replica, is_alive in zip(working, alive, strict=True):
            missed[replica] = 0 if is_alive else missed[replica] + 1
            if missed[replica] >= MISSED_LOOKS:
                missed[replica] = 0
                await pool.lose(replica, f"{replica.server.url} does not answer")
