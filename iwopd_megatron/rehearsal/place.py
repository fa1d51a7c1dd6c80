"""Where a rank is in a layout, counted here and not by Megatron: tp, cp, dp, pp; etp, ep, edp, pp.

Megatron's order (parallel_state, "tp-cp-ep-dp-pp"): neighbours differ in tp first. Experts are cut
along etp first, then ep.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from iwopd_megatron.config.models import Layout


@dataclass(frozen=True)
class Place:
    """Coordinates of one rank, each from 0 on."""

    rank: int
    tp: int
    cp: int
    dp: int
    pp: int
    etp: int
    ep: int
    expert_dp: int

    @classmethod
    def of(cls, rank: int, world: int, layout: Layout) -> Place:
        """Return the coordinates of a rank of `world`."""
        stage = world // layout.pp
        pp, inside = divmod(rank, stage)
        rest, tp = divmod(inside, layout.tp)
        dp, cp = divmod(rest, layout.cp)
        others, etp = divmod(inside, layout.etp)
        expert_dp, ep = divmod(others, layout.ep)
        return cls(rank, tp, cp, dp, pp, etp, ep, expert_dp)

    @property
    def shard(self) -> tuple[int, ...]:
        """What ranks with the same weights have in common."""
        return self.pp, self.tp, self.etp, self.ep


def places(world: int, layout: Layout) -> Iterator[Place]:
    """Yield the place of every rank."""
    return (Place.of(rank, world, layout) for rank in range(world))


def covering(world: int, layout: Layout) -> list[Place]:
    """Return few ranks that differ: the first of every stage, and of the end stages one more of
    every axis, its last.
    """
    found = {}
    for place in places(world, layout):
        off = [x for x in (place.tp, place.cp, place.dp, place.ep, place.etp, place.expert_dp) if x]
        if not off:
            found[place.rank] = place
    stage = world // layout.pp
    for pp in {0, layout.pp - 1}:
        first = pp * stage
        steps = {
            "tp": (layout.tp, 1),
            "cp": (layout.cp, layout.tp),
            "ep": (layout.ep, layout.etp),
            "dp": (stage // (layout.tp * layout.cp), layout.tp * layout.cp),
        }
        for size, step in steps.values():
            rank = first + (size - 1) * step
            found[rank] = Place.of(rank, world, layout)
    return [found[rank] for rank in sorted(found)]
