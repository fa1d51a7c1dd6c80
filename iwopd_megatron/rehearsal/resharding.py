"""Checkpoints of a layout, optimiser included: every rank's pieces, and other layouts that load it.

As Megatron plans them on every rank: on models of few layers a chunk for layouts of our choice, on
the whole model for those of the user's.
"""

from __future__ import annotations

import gc
from collections.abc import Iterable, Iterator, Mapping
from types import MappingProxyType

from iwopd_megatron.config.models import Layout
from iwopd_megatron.config.preflight import check_layout, describe
from iwopd_megatron.errors import RecipeError
from iwopd_megatron.rehearsal.checkpoints import (
    Piece,
    check_load,
    check_optimizer,
    check_pieces,
    pieces_of,
    states_of,
)
from iwopd_megatron.rehearsal.collectives import Recorder
from iwopd_megatron.rehearsal.job import Job
from iwopd_megatron.rehearsal.memoryless import Shapes
from iwopd_megatron.rehearsal.place import read_ranks
from iwopd_megatron.rehearsal.sources import HollowFolder
from iwopd_megatron.rehearsal.world import alone
from iwopd_megatron.runtime import device
from iwopd_megatron.train import checkpoint
from iwopd_megatron.train.student import StudentModel

# That load what the recipe's layout has saved: nothing cut, each axis, several at once.
OTHERS: list[dict[str, int]] = [
    {},
    {"tp": 2},
    {"pp": 2},
    {"ep": 2},
    {"tp": 2, "pp": 2, "vpp": 2},
    {"tp": 2, "ep": 2, "etp": 2},
]


def check_checkpoints(
    job: Job, layouts: Iterable[Layout], known: Mapping[int, list[Piece]] = MappingProxyType({})
) -> list[str]:
    """Return what is wrong with what all ranks save, and with what `layouts` find of it.

    known: pieces of ranks that have been rehearsed.
    """
    gc.freeze()  # Megatron collects garbage for every rank: only what came since
    try:
        return _check(job, layouts, known)
    finally:
        gc.unfreeze()


def _check(job: Job, layouts: Iterable[Layout], known: Mapping[int, list[Piece]]) -> list[str]:
    ranks = [place.rank for place in read_ranks(job.world, job.layout, job.gpus)]
    saved = {rank: known.get(rank) or pieces(job, rank, job.layout, job.world) for rank in ranks}
    everything = [piece for own in saved.values() for piece in own]
    states = len(states_of(everything))
    found = []
    for rank, own in saved.items():
        found += [f"{job.role} rank {rank}: {x}" for x in check_optimizer(own, states)]
    found += [f"{job.role}: the checkpoint: {x}" for x in check_pieces(everything)]
    for layout in layouts:
        for rank in range(layout.unit):
            wanted = pieces(job, rank, layout, layout.unit, is_loading=True)
            where = f"{job.role}: {describe(layout)} rank {rank} loads what {describe(job.layout)}"
            found += [f"{where} saves: {x}" for x in check_load(wanted, everything)]
    return found


def others(job: Job) -> Iterator[Layout]:
    """Yield few other layouts that the model can have."""
    for axes in OTHERS:
        layout = Layout(**axes)
        try:
            check_layout(layout, job.hf, "student")
        except RecipeError:
            continue
        if layout.axes != job.layout.axes:
            yield layout


def pieces(
    job: Job, rank: int, layout: Layout, world: int, is_loading: bool = False
) -> list[Piece]:
    """Return the pieces of weights and optimiser states that a rank saves, or asks for."""
    with alone(rank, world, layout) as parallel, device.as_gpu(), Shapes([], Recorder(True)):
        student = StudentModel(job.recipe, parallel, job.hf, HollowFolder(job.hf))
        return pieces_of(
            checkpoint.sharded_state(student.chunks, student.optimizer, parallel, is_loading)
        )
