"""What a rank says to others: every collective, send and receive, in order, with its bytes.

c10d's operations go through torch's dispatcher whoever calls them, so nothing has to be replaced,
and a run over gloo is recorded by the same lines as a rehearsal in which nobody answers.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import FakeWork

from iwopd_megatron.rehearsal.ledger import calling_line
from iwopd_megatron.rehearsal.memoryless import is_hollow, tensors_in

c10d = torch.ops.c10d


@dataclass(frozen=True)
class Call:
    """One operation of one rank. Bytes are what this rank gives, or gets in `receive`."""

    operation: str
    axis: str  # the group's name among all groups of its kind
    ranks: tuple[int, ...]
    nbytes: int
    dtype: str
    line: str
    peer: int | None = None  # the other rank of send and receive, the source of a broadcast
    sent: tuple[int, ...] = ()  # of all_to_all: bytes to every rank of the group
    received: tuple[int, ...] = ()


@dataclass(frozen=True)
class _Kind:
    """How an operation of c10d is read: its name, and where its arguments are."""

    name: str
    group: int
    given: int | None  # what this rank gives; None: nothing
    taken: int  # what it gets
    returns: int | None = None  # the argument that is returned before the work; None: work alone
    peer: int | None = None


_KINDS = {
    c10d.allreduce_.default: _Kind("all_reduce", 1, 0, 0, 0),
    c10d.allreduce_coalesced_.default: _Kind("all_reduce", 1, 0, 0),
    c10d.broadcast_.default: _Kind("broadcast", 1, 0, 0, 0, peer=2),
    c10d.allgather_.default: _Kind("all_gather", 2, 1, 0, 0),
    c10d._allgather_base_.default: _Kind("all_gather", 2, 1, 0, 0),
    c10d.allgather_into_tensor_coalesced_.default: _Kind("all_gather", 2, 1, 0),
    c10d.reduce_scatter_.default: _Kind("reduce_scatter", 2, 1, 0, 0),
    c10d._reduce_scatter_base_.default: _Kind("reduce_scatter", 2, 1, 0, 0),
    c10d.reduce_scatter_tensor_coalesced_.default: _Kind("reduce_scatter", 2, 1, 0),
    c10d.alltoall_base_.default: _Kind("all_to_all", 2, 1, 0),
    c10d.gather_.default: _Kind("gather", 2, 1, 0, peer=3),
    c10d.scatter_.default: _Kind("scatter", 2, 1, 0, 0, peer=3),
    c10d.send.default: _Kind("send", 1, 0, 0, peer=2),
    c10d.recv_.default: _Kind("receive", 1, 0, 0, peer=2),
    c10d.barrier.default: _Kind("barrier", 1, None, 0),
}


class NotSaidYet(Exception):
    """What this rank waits for comes from a rank that has not run so far."""


class Place(NamedTuple):
    """A call's place: in a phase, the how-manieth on a group."""

    phase: str
    axis: str
    ranks: tuple[int, ...]
    number: int


class Mailbox:
    """What ranks that ran before said in real numbers, for those that run later.

    Names, lengths and counts are real; a rank that is rehearsed alone gets those of the others from
    here: what they said, or in groups of which nobody ran, what those did at their place in another
    group of the kind.
    """

    def __init__(self, stage: int = 0) -> None:
        """stage: ranks of a pipeline stage, of which groups are alike; 0: no group is."""
        self.stage = stage
        self._said: dict[Place, dict[int, list[torch.Tensor]]] = defaultdict(dict)

    def put(self, place: Place, rank: int, tensors: list[torch.Tensor]) -> None:
        """Keep what the rank of this number in its group gave."""
        kept = [x.clone() for x in tensors]
        self._said[place][rank] = kept
        self._said[self._kind(place)].setdefault(rank, kept)

    def get(self, place: Place, rank: int) -> list[torch.Tensor] | None:
        """Return what a rank gave, None where nobody has that is like it."""
        said = self._said[place].get(rank)
        if said is None and self.stage:
            said = self._said[self._kind(place)].get(rank)
        return said

    def _kind(self, place: Place) -> Place:
        stages = sorted({rank // self.stage for rank in place.ranks}) if self.stage else [-1]
        return place._replace(ranks=(-1, *stages))


class Recorder:
    """Records every c10d operation; runs it if there are others, else seems to."""

    def __init__(self, is_alone: bool, mailbox: Mailbox | None = None):
        self.calls: list[Call] = []
        self.is_alone, self.mailbox = is_alone, mailbox or Mailbox()
        self.phase = ""
        self._counts: Counter[tuple[str, str]] = Counter()
        self._ranks: dict[str, tuple[int, ...]] = {}

    def run(self, operation: Any, arguments: Sequence[Any]) -> Any:
        """Record an operation of c10d and return what it returns."""
        kind = _KINDS[operation]
        group = dist.ProcessGroup.unbox(arguments[kind.group])
        given = [] if kind.given is None else tensors_in(arguments[kind.given])
        taken = tensors_in(arguments[kind.taken])
        self._record(kind, group, given, taken, arguments)
        if not self.is_alone:
            return operation(*arguments)
        self._exchange(kind, group, given, taken, arguments)
        work = FakeWork().boxed()
        return work if kind.returns is None else (arguments[kind.returns], work)

    def _record(self, kind: _Kind, group, given, taken, arguments) -> None:
        ranks = self._ranks_of(group)
        counted = taken if kind.name == "receive" else given
        peer = None if kind.peer is None else ranks[arguments[kind.peer]]
        splits: dict[str, tuple[int, ...]] = {}
        if kind.name == "all_to_all":
            splits["sent"] = _bytes_by_rank(given[0], arguments[4], len(ranks))
            splits["received"] = _bytes_by_rank(taken[0], arguments[3], len(ranks))
        self.calls.append(
            Call(
                kind.name,
                group.group_desc,
                ranks,
                sum(x.nbytes for x in counted),
                str(counted[0].dtype)[6:] if counted else "",
                calling_line(),
                peer,
                **splits,
            )
        )

    def _ranks_of(self, group: dist.ProcessGroup) -> tuple[int, ...]:
        name = group.group_name
        if name not in self._ranks:
            self._ranks[name] = tuple(dist.get_process_group_ranks(group))
        return self._ranks[name]

    def _exchange(self, kind: _Kind, group, given, taken, arguments) -> None:
        """Have others answer: with what they said before, or with what this rank says itself."""
        if kind.name in ("send", "receive"):
            return
        counted = self.phase, group.group_name
        ranks = self._ranks_of(group)
        place = Place(self.phase, group.group_desc, ranks, self._counts[counted])
        self._counts[counted] += 1
        if any(is_hollow(x) for x in given + taken):
            return
        self.mailbox.put(place, group.rank(), given)
        if kind.name == "all_gather":
            for rank in range(group.size()):
                said = self.mailbox.get(place, rank) or given
                _fill(taken, rank, group.size(), said)
        elif kind.name == "broadcast":
            said = self.mailbox.get(place, arguments[kind.peer])
            if said is None:
                raise NotSaidYet(kind.name)
            for own, other in zip(taken, said, strict=True):
                own.copy_(other)


def _bytes_by_rank(tensor: torch.Tensor, splits: list[int], size: int) -> tuple[int, ...]:
    """Return bytes that go to, or come from, every rank of a group; no splits: equal ones."""
    if not splits:
        return (tensor.nbytes // size,) * size
    row = tensor.nbytes // max(1, sum(splits))
    return tuple(rows * row for rows in splits)


def _fill(taken: list[torch.Tensor], rank: int, size: int, said: list[torch.Tensor]) -> None:
    """Put what a rank said in its place among what all said."""
    if len(taken) == size:
        own, other = taken[rank].view(-1), said[0].view(-1)
    else:
        own, other = taken[0].view(size, -1)[rank], said[0].view(-1)
    own[: len(other)] = other[: len(own)]
