"""Which part of which tensor every rank reads, holds and gives away, at the real configuration.

Each rank's own model is built and loaded by the code of the run from tensors that note what is read
of them. What is noted is held against places that are counted here (place.py), so that a shard that
tiles the whole but lies on the wrong rank is found too.
"""

from __future__ import annotations

import contextlib
import math
from collections import Counter, defaultdict, deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from iwopd_megatron.config.stages import stage_layers
from iwopd_megatron.errors import RecipeError
from iwopd_megatron.models.gpt import build_model
from iwopd_megatron.plan.model_size import ModelSize
from iwopd_megatron.rehearsal.checkpoints import Piece, check_pieces, pieces_of
from iwopd_megatron.rehearsal.collectives import Mailbox, NotSaidYet, Recorder
from iwopd_megatron.rehearsal.job import Job
from iwopd_megatron.rehearsal.memoryless import Shapes
from iwopd_megatron.rehearsal.place import Place, read_ranks
from iwopd_megatron.rehearsal.push import pushed
from iwopd_megatron.rehearsal.sources import HollowFolder, Region, shapes_of
from iwopd_megatron.rehearsal.world import alone
from iwopd_megatron.runtime import device
from iwopd_megatron.train import checkpoint
from iwopd_megatron.weights.hf_reader import load_shards
from iwopd_megatron.weights.sync import WeightStream
from iwopd_megatron.weights.table import mapped_parameters


@dataclass
class Slices:
    """What was read by how many ranks, and what is wrong with it."""

    ranks: int = 0
    tensors: int = 0
    gaps: list[str] = field(default_factory=list)
    overlaps: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)  # shapes, places, counts

    @property
    def findings(self) -> list[str]:
        """All that is wrong."""
        return self.gaps + self.overlaps + self.wrong


def read_slices(job: Job) -> Slices:
    """Build and load every rank's model; return what does not fit."""
    found = Slices()
    read: dict[str, dict[Region, int]] = defaultdict(lambda: defaultdict(int))
    mailbox = Mailbox()
    pieces: list[Piece] = []
    ranks = read_ranks(job.world, job.layout, job.gpus)
    for place in ranks:
        for name, region in _rank(job, place, found, mailbox, pieces):
            read[name][region] += 1
    found.ranks = len(ranks)
    _cover(job, read, found)
    if job.trains:
        found.wrong += [f"{job.role}: the checkpoint: {x}" for x in check_pieces(pieces)]
        _push(job, ranks[0], found, mailbox)
    return found


def _rank(
    job: Job, place: Place, found: Slices, mailbox: Mailbox, pieces: list[Piece]
) -> list[tuple[str, Region]]:
    """Return what one rank reads; adds what it would write of a checkpoint's weights."""
    folder = HollowFolder(job.hf)
    where = f"{job.role} rank {place.rank}"
    with alone(place.rank, job.world, job.layout) as parallel:
        recorder = Recorder(is_alone=True, mailbox=mailbox)
        with device.as_gpu(), Shapes([], recorder):
            chunks = build_model(job.hf, parallel, job.model.dtype)
            try:
                load_shards(chunks, folder, job.hf, parallel)
            except RecipeError as error:
                found.wrong.append(f"{where}: {error}")
            if job.trains:
                WeightStream(chunks, job.hf, parallel)  # its names, for those that come later
                pieces += pieces_of(checkpoint.model_state(chunks, parallel))
        at = parallel
        own = at.tp.rank, at.cp.rank, at.dp.rank, at.pp.rank, at.etp.rank, at.ep.rank
        if own != (place.tp, place.cp, place.dp, place.pp, place.etp, place.ep):
            found.wrong.append(f"{where}: Megatron puts it elsewhere, tp cp dp pp etp ep {own}.")
        held = sum(x.numel() for chunk in chunks for x in chunk.parameters())
        planned = ModelSize.of(job.hf).share(job.layout, place.pp).total
        if held != planned:
            found.wrong.append(f"{where} holds {held} parameters, the plan has {planned:.0f}.")
        for chunk in chunks:
            for mapped in mapped_parameters(chunk, job.hf):
                _check_layer(job, place, mapped.hf_names, found)
    for name, region in folder.reads:
        said = _misplaced(job, place, name, region)
        if said:
            found.wrong.append(f"{where} {said}")
    return folder.reads


def _check_layer(job: Job, place: Place, names: Iterable[str], found: Slices) -> None:
    """Check that a parameter's tensors are this stage's layers and this rank's experts."""
    experts, size = job.hf.num_experts, job.layout.ep
    stage = stage_layers(job.layout, job.hf.num_hidden_layers)[place.pp]
    for name in names:
        if ".layers." in name:
            layer = int(name.split(".layers.")[1].split(".")[0])
            if not any(layer in chunk for chunk in stage):
                found.wrong.append(
                    f"{job.role} rank {place.rank} holds {name}, a layer of another stage."
                )
        if ".experts." in name:
            expert = int(name.split(".experts.")[1].split(".")[0])
            if expert // (experts // size) != place.ep:
                found.wrong.append(
                    f"{job.role} rank {place.rank} holds {name}, an expert of expert-parallel rank "
                    f"{expert // (experts // size)}, and is {place.ep}."
                )


def _misplaced(job: Job, place: Place, name: str, region: Region) -> str | None:
    """Return what is wrong with a part that is not the one at this rank's place on its axis."""
    shape = shapes_of(job.hf)[name]
    is_expert = ".experts." in name
    rank, size = (place.etp, job.layout.etp) if is_expert else (place.tp, job.layout.tp)
    for (first, end), whole in zip(region, shape, strict=True):
        part = end - first
        if part == whole:
            continue
        if part * size != whole or first != rank * part:
            return (
                f"reads [{first}, {end}) of {whole} of {name}, where its place, {rank} of {size}, "
                f"has [{rank * whole // size}, {(rank + 1) * whole // size})."
            )
    return None


def _cover(job: Job, read: dict[str, dict[Region, int]], found: Slices) -> None:
    """Check that every tensor is read whole, no part twice by one copy, and equally often."""
    shapes = shapes_of(job.hf)
    found.tensors = len(shapes)
    for name, shape in shapes.items():
        regions = read.get(name, {})
        volume = sum(math.prod(b - a for a, b in region) for region in regions)
        whole = math.prod(shape)
        if volume < whole:
            missing = "by nobody" if not regions else f"{volume} of {whole} elements only"
            found.gaps.append(f"{job.role}: {name} is read {missing}.")
        elif volume > whole or _overlap(list(regions)):
            found.overlaps.append(f"{job.role}: parts of {name} overlap: {_first(regions)}.")
        elif len(set(regions.values())) > 1:
            found.overlaps.append(f"{job.role}: parts of {name} are read {_first(regions)} times.")
    for name in sorted(set(read) - set(shapes)):
        found.wrong.append(f"{job.role}: {name} is read, which the configuration does not have.")


def _first(regions: dict[Region, int]) -> str:
    return ", ".join(f"{list(region)}: {count}" for region, count in list(regions.items())[:3])


def _overlap(regions: list[Region]) -> bool:
    return any(
        all(max(a[0], b[0]) < min(a[1], b[1]) for a, b in zip(x, y, strict=True))
        for i, x in enumerate(regions)
        for y in regions[:i]
    )


def _push(job: Job, place: Place, found: Slices, mailbox: Mailbox) -> None:
    """Check that the weight stream gives every tensor once, whole and in its shape.

    On the first rank of every stage; each waits for what the stages before it send.
    """
    stage = job.world // job.layout.pp
    ranks = [place.rank + i * stage for i in range(job.layout.pp)]
    for rank in ranks[:-1]:
        with contextlib.suppress(NotSaidYet):
            deque(_stream(job, rank, mailbox), maxlen=0)
    for rank in dict.fromkeys([ranks[-1], ranks[0]]):
        _check_stream(job, rank, found, mailbox)


def _stream(job: Job, rank: int, mailbox: Mailbox) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield name and shape of every tensor that the weight stream gives on a rank."""
    with alone(rank, job.world, job.layout) as parallel:
        with device.as_gpu(), Shapes([], Recorder(is_alone=True, mailbox=mailbox)):
            chunks = build_model(job.hf, parallel, job.model.dtype)
            stream = WeightStream(chunks, job.hf, parallel)
            for name, tensor in pushed(stream, job.recipe, rank == 0):
                yield name, tuple(tensor.shape)


def _check_stream(job: Job, rank: int, found: Slices, mailbox: Mailbox) -> None:
    where = f"{job.role} rank {rank}: the weight stream"
    wanted = shapes_of(job.hf)
    given: Counter[str] = Counter()
    for name, shape in _stream(job, rank, mailbox):
        given[name] += 1
        if shape != wanted.get(name, shape):
            found.wrong.append(f"{where} gives {name} as {shape}, not {wanted[name]}.")
    for name in sorted(set(wanted) - set(given)):
        found.gaps.append(f"{where} does not give {name}.")
    for name, count in given.items():
        if count > 1 or name not in wanted:
            found.overlaps.append(f"{where} gives {name} {count} times.")
