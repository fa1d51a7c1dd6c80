"""Plays what all ranks say to one another, and names who waits for ever, and for what.

A send is free, a receive waits for its send, a collective waits until every rank of its group is
there with the same operation. Ranks that were not rehearsed do what one of their kind does, in
their own groups.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Mapping, Sequence
from dataclasses import replace

from iwopd_megatron.rehearsal.collectives import Call

# Of pickled objects, which are padded to the longest of the group: a rank alone knows its own.
OBJECTS = "uint8"
Groups = Mapping[str, Sequence[tuple[int, ...]]]


def program_of(rank: int, template: Sequence[Call], of: int, groups: Groups) -> list[Call]:
    """Return what `rank` does if it does what rank `of` did, in the groups that it is in itself.

    Both are of one stage. KeyError where it has no group of that kind.
    """
    own: dict[tuple[str, tuple[int, ...]], tuple[int, ...]] = {}
    calls = []
    for call in template:
        key = call.axis, call.ranks
        if key not in own:
            own[key] = _counterpart(rank, of, call, groups)
        ranks = own[key]
        peer = call.peer
        if call.operation in ("send", "receive") and peer is not None:
            peer += rank - of  # of the other stage's ranks the one with the same place in it
        elif peer is not None:
            peer = ranks[call.ranks.index(peer)]
        calls.append(replace(call, ranks=ranks, peer=peer))
    return calls


def _counterpart(rank: int, of: int, call: Call, groups: Groups) -> tuple[int, ...]:
    """Return the group of `rank` of a call's axis, in which it has the place that `of` has."""
    if len(call.ranks) == 1 + max(call.ranks) and rank in call.ranks:  # the world
        return call.ranks
    place = call.ranks.index(of)
    for ranks in groups[call.axis]:
        if rank in ranks and len(ranks) == len(call.ranks):
            if ranks.index(rank) == place or call.peer is None:
                return ranks
    raise KeyError(f"rank {rank} has no group of {call.axis} like rank {of}'s {call.ranks}")


def compare(programs: Mapping[int, Sequence[Call]]) -> list[str]:
    """Return a sentence for every group in which two rehearsed ranks do not do the same.

    Same order of operations, dtypes and bytes; of all_to_all, what one sends is what the other
    expects from it.
    """
    by_group: dict[tuple[str, tuple[int, ...]], dict[int, list[Call]]] = defaultdict(dict)
    for rank, calls in programs.items():
        for call in calls:
            if call.operation not in ("send", "receive"):
                by_group[call.axis, call.ranks].setdefault(rank, []).append(call)
    found = []
    for (axis, ranks), members in by_group.items():
        present = [rank for rank in ranks if rank in programs]
        for rank in present[1:]:
            ours, theirs = members.get(present[0], []), members.get(rank, [])
            said = _difference(axis, present[0], ours, rank, theirs, ranks)
            if said:
                found.append(said)
    return found


def _difference(
    axis: str, a: int, first: list[Call], b: int, second: list[Call], ranks: tuple[int, ...]
) -> str | None:
    for i, (x, y) in enumerate(zip(first, second, strict=False)):
        if (x.operation, x.dtype) != (y.operation, y.dtype):
            return (
                f"{axis} {_short(ranks)}: call {i} of rank {a} is {x.operation} {x.dtype} "
                f"({x.line}), of rank {b} {y.operation} {y.dtype} ({y.line})."
            )
        if x.operation == "all_to_all":
            to_b, from_a = x.sent[ranks.index(b)], y.received[ranks.index(a)]
            if to_b != from_a:
                return (
                    f"{axis} {_short(ranks)}: in call {i} rank {a} sends {to_b} bytes to rank {b}, "
                    f"which expects {from_a} ({y.line})."
                )
        elif x.nbytes != y.nbytes and x.dtype != OBJECTS:
            return (
                f"{axis} {_short(ranks)}: in call {i}, {x.operation}, rank {a} has {x.nbytes} "
                f"bytes and rank {b} {y.nbytes} ({y.line})."
            )
    if len(first) != len(second):
        more, less, calls = (a, b, first) if len(first) > len(second) else (b, a, second)
        call = calls[min(len(first), len(second))]
        return (
            f"{axis} {_short(ranks)}: rank {more} calls {call.operation} once more than rank "
            f"{less} ({call.line})."
        )
    return None


def play(programs: Mapping[int, Sequence[Call]]) -> list[str]:
    """Return a sentence for every rank that never ends, and for sends that nobody receives."""
    at = dict.fromkeys(programs, 0)
    sent: dict[tuple[int, int], deque[Call]] = defaultdict(deque)
    runnable = deque(programs)
    waiting: dict[tuple[str, tuple[int, ...]], set[int]] = defaultdict(set)
    mismatched: list[str] = []

    def advance(rank: int) -> None:
        at[rank] += 1
        runnable.append(rank)

    while runnable:
        rank = runnable.popleft()
        calls = programs[rank]
        while at[rank] < len(calls):
            call = calls[at[rank]]
            if call.operation == "send":
                assert call.peer is not None
                sent[rank, call.peer].append(call)
                runnable.append(call.peer)
            elif call.operation == "receive":
                assert call.peer is not None
                box = sent[call.peer, rank]
                if not box:
                    break
                other = box.popleft()
                if (other.nbytes, other.dtype) != (call.nbytes, call.dtype):
                    mismatched.append(
                        f"rank {call.peer} sends {other.nbytes} bytes of {other.dtype} "
                        f"({other.line}) to rank {rank}, which receives {call.nbytes} of "
                        f"{call.dtype} ({call.line})."
                    )
            else:
                members = [member for member in call.ranks if member in programs]
                group = waiting[call.axis, call.ranks]
                group.add(rank)
                if len(group) < len(members) or not _agree(members, programs, at, call):
                    break
                group.clear()
                for member in members:
                    if member != rank:
                        advance(member)
            at[rank] += 1
    found = mismatched
    for rank, calls in programs.items():
        if at[rank] < len(calls):
            found.append(_stuck(rank, calls[at[rank]], programs, at))
    left = sum(map(len, sent.values()))
    if left and not found:
        pair = next(pair for pair, box in sent.items() if box)
        found.append(
            f"{left} messages are never received, the first of rank {pair[0]} to {pair[1]}."
        )
    return found


def _agree(members: Sequence[int], programs, at: Mapping[int, int], call: Call) -> bool:
    """Return whether all members are at the same operation of the same group."""
    for member in members:
        calls = programs[member]
        if at[member] >= len(calls):
            return False
        other = calls[at[member]]
        if (other.operation, other.axis, other.ranks) != (call.operation, call.axis, call.ranks):
            return False
    return True


def _stuck(rank: int, call: Call, programs, at: Mapping[int, int]) -> str:
    """Say what a rank waits for."""
    if call.operation == "receive":
        return f"rank {rank} waits for ever for rank {call.peer}'s message ({call.line})."
    missing = []
    for member in call.ranks:
        if member == rank or member not in programs:
            continue
        calls = programs[member]
        other = calls[at[member]] if at[member] < len(calls) else None
        if other is None:
            missing.append(f"rank {member}, which has ended")
        elif (other.operation, other.axis, other.ranks) != (call.operation, call.axis, call.ranks):
            missing.append(f"rank {member}, which is at {other.operation} of {other.axis}")
    who = missing[0] if missing else "others"
    return f"rank {rank} waits for ever in {call.operation} of {call.axis} ({call.line}) for {who}."


def _short(ranks: tuple[int, ...]) -> str:
    """Return a group's ranks, few of many."""
    if len(ranks) <= 4:
        return str(list(ranks))
    return f"[{ranks[0]}, {ranks[1]}, ... {ranks[-1]}]"
