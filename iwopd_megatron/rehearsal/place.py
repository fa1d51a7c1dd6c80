"""Where a rank is in a layout, counted here and not by Megatron: tp, cp, dp, pp; etp, ep, edp, pp.

Megatron's order (parallel_state, "tp-cp-ep-dp-pp"): neighbours differ in tp first. Experts are cut
along etp first, then ep.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from iwopd_megatron.config.models import Layout

ALL_RANKS = 256  # GPUs of a run of which every rank's slices are read


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


def read_ranks(world: int, layout: Layout, gpus: int) -> list[Place]:
    """Return all ranks; where the run has more than ALL_RANKS GPUs the first with their weights."""
    everyone = list(places(world, layout))
    if gpus <= ALL_RANKS:
        return everyone
    return list({place.shard: place for place in reversed(everyone)}.values())[::-1]


def covering(world: int, layout: Layout) -> list[Place]:
    """Return few ranks that differ: of every stage the first, of the end stages each axis's last.

    Of an axis, the rank that is like the first but last on this one.
    """
    stage, copies = world // layout.pp, layout.tp * layout.cp
    ranks = {stage * pp for pp in range(layout.pp)}
    axes = [
        (layout.tp, 1),
        (layout.cp, layout.tp),
        (layout.ep, layout.etp),
        (stage // copies, copies),
    ]
    for first in (0, world - stage):
        ranks |= {first + (size - 1) * step for size, step in axes}
    return [Place.of(rank, world, layout) for rank in sorted(ranks)]
