"""Threads that share one process's products while it decodes.

Of the standard library, not torch's own: MKL given several threads rounds otherwise than with one,
and OpenMP's threads do not survive a fork. torch's operators let go of the interpreter.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import TypeVar

import torch

T = TypeVar("T")
Part = TypeVar("Part")


class Threads:
    """The calling thread and `count` - 1 helpers, which start with their first work.

    They end with the `with` block.
    """

    def __init__(self, count: int):
        self.count = count
        self._pool = ThreadPoolExecutor(count - 1, "decoding") if count > 1 else None

    def __enter__(self) -> Threads:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._pool is not None:
            self._pool.shutdown()

    def over(self, function: Callable[[Part], T], parts: Sequence[Part]) -> list[T]:
        """Return function(part) of each, in order, without gradients; at most `count` parts."""
        if self._pool is None or len(parts) == 1:
            return [function(part) for part in parts]
        helped = [self._pool.submit(_without_gradients, function, part) for part in parts[1:]]
        own = function(parts[0])
        return [own, *(one.result() for one in helped)]


@torch.inference_mode()  # which a thread does not inherit
def _without_gradients(function: Callable[[Part], T], part: Part) -> T:
    return function(part)
