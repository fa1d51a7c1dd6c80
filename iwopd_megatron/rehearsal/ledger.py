"""Bytes alive: of every storage that an operation makes, until it is freed, by kind and phase."""

from __future__ import annotations

import contextlib
import sys
import weakref
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import FrameType

import torch

from iwopd_megatron.rehearsal.memoryless import Operation

LISTED = 1.03  # times the peak at which the largest were listed before
HEAD = "iwopd_megatron/loss/"
PACKAGE = str(Path(__file__).parents[1])
OVERLOOKED = (str(Path(__file__).parent), str(Path(__file__).parents[1] / "runtime/stand_ins"))


@dataclass(frozen=True)
class Storage:
    """A storage that is alive: its bytes, kind, shape, dtype, and the line that made it."""

    nbytes: int
    kind: str
    phase: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    line: str


@dataclass
class Peak:
    """The most that was alive at once, by kind, and the largest of a phase's own near it."""

    size: int = 0
    kinds: dict[str, int] = field(default_factory=dict)
    largest: list[Storage] = field(default_factory=list)
    _listed: int = 0  # the size at which those were looked for

    def rise(self, ledger: Ledger) -> None:
        """Take what is alive now."""
        self.size, self.kinds = ledger.total, ledger.now
        if self.size > LISTED * self._listed:
            self._listed, self.largest = self.size, ledger.alive(ledger.name)[:5]


@dataclass
class Phase:
    """What was alive in a phase: the most while the head ran and while layers did, and at its end.

    Apart, since either may be the most, which depends on how many layers there are.
    """

    head: Peak = field(default_factory=Peak)
    body: Peak = field(default_factory=Peak)
    after: dict[str, int] = field(default_factory=dict)

    @property
    def peak(self) -> int:
        """Bytes at the most."""
        return max(self.head.size, self.body.size)


class Ledger:
    """Counts storages as operations make them; an observer of `Watched`."""

    def __init__(self) -> None:
        self.kind = self.name = "other"
        self.phases: dict[str, Phase] = {}
        self._now: Counter[str] = Counter()
        self.total = 0
        self._alive: dict[int, Storage] = {}

    @contextlib.contextmanager
    def phase(self, name: str, kind: str) -> Iterator[None]:
        """Count what is made inside as of this phase and kind."""
        before = self.name, self.kind
        self.name, self.kind = name, kind
        self.phases.setdefault(name, Phase())
        self._peak("")
        try:
            yield
        finally:
            self.phases[name].after = self.now
            self.name, self.kind = before

    @contextlib.contextmanager
    def counting_as(self, kind: str) -> Iterator[None]:
        """Count what is made inside as of this kind."""
        before, self.kind = self.kind, kind
        try:
            yield
        finally:
            self.kind = before

    def kind_of(self, tensor: torch.Tensor) -> str | None:
        """Return the kind of a tensor's storage; None of one that is not counted."""
        found = self._alive.get(tensor.untyped_storage()._cdata)
        return None if found is None else found.kind

    @property
    def now(self) -> dict[str, int]:
        """Bytes alive by kind."""
        return {kind: size for kind, size in self._now.items() if size}

    def alive(self, phase: str) -> list[Storage]:
        """Return what a phase made and is still there, the largest first."""
        found = [x for x in self._alive.values() if x.phase == phase]
        return sorted(found, key=lambda x: -x.nbytes)

    def see(self, operation: Operation, inputs: list[torch.Tensor], outputs: list[torch.Tensor]):
        """Count the storages of the results that are new."""
        for tensor in outputs:
            self.add(tensor)

    def add(self, tensor: torch.Tensor) -> None:
        """Count a tensor's storage, unless it is counted already."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._alive:
            return
        size = storage.nbytes()
        line = calling_line()
        kind = self.kind
        self._alive[key] = Storage(size, kind, self.name, tuple(tensor.shape), tensor.dtype, line)
        self._now[kind] += size
        self.total += size
        weakref.finalize(storage, self._free, key).atexit = False
        self._peak(line)

    def count_as(self, tensor: torch.Tensor, kind: str) -> None:
        """Count a tensor's storage as of another kind, as where parameters move into one buffer."""
        key = tensor.untyped_storage()._cdata
        if key not in self._alive:
            self.add(tensor)
        storage = self._alive[key]
        self._now[storage.kind] -= storage.nbytes
        self._now[kind] += storage.nbytes
        self._alive[key] = replace(storage, kind=kind)

    def _free(self, key: int) -> None:
        gone = self._alive.pop(key)
        self._now[gone.kind] -= gone.nbytes
        self.total -= gone.nbytes

    def _peak(self, line: str) -> None:
        phase = self.phases.get(self.name)
        if phase is None:
            return
        peak = phase.head if line.startswith(HEAD) else phase.body
        if self.total > peak.size:
            peak.rise(self)


def calling_line() -> str:
    """Return `file:line` of the innermost line of this package, or of Megatron, that is running."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        path = frame.f_code.co_filename
        if (path.startswith(PACKAGE) and not path.startswith(OVERLOOKED)) or "/megatron/" in path:
            short = path.rpartition("/megatron/")[2] if "/megatron/" in path else path
            where = f"megatron/{short}" if "/megatron/" in path else path[len(PACKAGE) - 14 :]
            return f"{where}:{frame.f_lineno}"
        frame = frame.f_back
    return "?"
