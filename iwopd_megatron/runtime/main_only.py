"""What only rank 0 has, as every rank of the world sees it: one order of collectives for all.

HTTP clients, queues and servers live on rank 0. Code that every rank runs takes its steps with them
through `MainOnly`, so that no rank can take another step than the others.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Concatenate, Generic, NoReturn, ParamSpec, TypeVar

from iwopd_megatron.runtime.parallel import Parallel

T = TypeVar("T")
Value = TypeVar("Value")
Arguments = ParamSpec("Arguments")


class MainOnly(ABC, Generic[T]):
    """A thing of rank 0, the same on every rank to look at."""

    @abstractmethod
    def call(
        self,
        step: Callable[Concatenate[T, Arguments], Value],
        *args: Arguments.args,
        **kwargs: Arguments.kwargs,
    ) -> Value:
        """Call `step(thing, ...)` on rank 0 and return its value on every rank. Collective.

        step: a method of the thing's class. What it raises is raised on every rank.
        """

    @abstractmethod
    def tell(
        self,
        step: Callable[Concatenate[T, Arguments], None],
        *args: Arguments.args,
        **kwargs: Arguments.kwargs,
    ) -> None:
        """Call `step(thing, ...)` on rank 0; do nothing on other ranks. Not collective."""

    @abstractmethod
    def peek(
        self,
        otherwise: Value,
        step: Callable[Concatenate[T, Arguments], Value],
        *args: Arguments.args,
        **kwargs: Arguments.kwargs,
    ) -> Value:
        """Return what `step(thing, ...)` does on rank 0, `otherwise` elsewhere. Not collective."""


class Held(MainOnly[T]):
    """Rank 0's: has the thing."""

    def __init__(self, parallel: Parallel, thing: T):
        self.parallel, self.thing = parallel, thing

    def call(
        self,
        step: Callable[Concatenate[T, Arguments], Value],
        *args: Arguments.args,
        **kwargs: Arguments.kwargs,
    ) -> Value:
        return self.parallel.on_main(lambda: step(self.thing, *args, **kwargs))

    def tell(
        self,
        step: Callable[Concatenate[T, Arguments], None],
        *args: Arguments.args,
        **kwargs: Arguments.kwargs,
    ) -> None:
        step(self.thing, *args, **kwargs)

    def peek(
        self,
        otherwise: Value,
        step: Callable[Concatenate[T, Arguments], Value],
        *args: Arguments.args,
        **kwargs: Arguments.kwargs,
    ) -> Value:
        return step(self.thing, *args, **kwargs)


class HeldElsewhere(MainOnly[T]):
    """The other ranks': hears what rank 0 finds."""

    def __init__(self, parallel: Parallel):
        self.parallel = parallel

    def call(
        self,
        step: Callable[Concatenate[T, Arguments], Value],
        *args: Arguments.args,
        **kwargs: Arguments.kwargs,
    ) -> Value:
        return self.parallel.on_main(_not_here)

    def tell(
        self,
        step: Callable[Concatenate[T, Arguments], None],
        *args: Arguments.args,
        **kwargs: Arguments.kwargs,
    ) -> None:
        pass

    def peek(
        self,
        otherwise: Value,
        step: Callable[Concatenate[T, Arguments], Value],
        *args: Arguments.args,
        **kwargs: Arguments.kwargs,
    ) -> Value:
        return otherwise


def main_only(parallel: Parallel, make: Callable[[], T]) -> MainOnly[T]:
    """Return what `make` makes on rank 0; other ranks do not call it. Not collective."""
    return Held(parallel, make()) if parallel.is_main else HeldElsewhere(parallel)


def _not_here() -> NoReturn:
    raise AssertionError("only rank 0 is asked")
