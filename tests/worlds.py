"""Worlds of forked gloo ranks: `run_world(2, check, 1e-6)` runs check(1e-6) on two ranks."""

import time
from collections.abc import Callable
from typing import Any

from iwopd_megatron.runtime.local_world import start_local


def run_world(world: int, function: Callable[..., Any], *args: Any, limit: float = 300) -> None:
    """Join `world` ranks of function(*args); the first failure of any rank is raised here.

    After `limit` seconds the ranks are killed, so that a deadlock is a failure and not a hang.
    """
    context = start_local(world, function, args)
    end = time.monotonic() + limit
    while not context.join(timeout=max(0.1, end - time.monotonic())):
        if time.monotonic() >= end:
            for process in context.processes:
                process.kill()
            raise TimeoutError(f"{function.__name__} did not finish in {limit} s on {world} ranks")
