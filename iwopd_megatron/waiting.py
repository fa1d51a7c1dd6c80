"""Waiting on every rank for what only rank 0 sees, without a collective running out of time."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from iwopd_megatron.errors import UserError
from iwopd_megatron.parallel import share

T = TypeVar("T")
HEARTBEAT_SECONDS = 30.0  # far below any collective's timeout
POLL_SECONDS = 0.02


def on_main(function: Callable[[], T]) -> T:
    """`function()` of rank 0, on every rank; so is its UserError. For short calls. Collective."""
    return _same_everywhere(share(_outcome(function) if dist.get_rank() == 0 else None))


def wait_together(is_done: Callable[[], bool]) -> None:
    """Return on every rank once `is_done()` is true on rank 0, which alone calls it. Collective.

    A UserError it raises is raised on every rank.
    """

    def poll() -> bool:
        end = time.monotonic() + HEARTBEAT_SECONDS
        while not is_done():
            if time.monotonic() > end:
                return False
            time.sleep(POLL_SECONDS)
        return True

    while not on_main(poll):
        pass


def _outcome(function: Callable[[], Any]) -> Any:
    try:
        return function()
    except UserError as error:
        return error


def _same_everywhere(outcome: Any) -> Any:
    if isinstance(outcome, UserError):
        raise outcome
    return outcome
