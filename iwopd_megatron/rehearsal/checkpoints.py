"""What every rank writes of a checkpoint: whether the pieces are the whole, each written once.

A checkpoint's tensors are the same whatever layout wrote them, so a layout whose pieces tile them,
and that asks for the same pieces when it loads, can read what any other such layout has written.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch

from iwopd_megatron.runtime.megatron import (
    ShardedTensor,
    is_main_replica,
    nested_values,
    save_preprocess,
)
from iwopd_megatron.weights.table import UNTRAINED

OPTIMIZER = "optimizer."  # keys of states begin so


@dataclass(frozen=True)
class Piece:
    """A rank's part of one global tensor of a checkpoint."""

    key: str
    whole: tuple[int, ...]
    dtype: torch.dtype
    first: tuple[int, ...]
    shape: tuple[int, ...]
    is_written: bool  # by this rank, others have copies

    @property
    def size(self) -> int:
        """Elements."""
        return math.prod(self.shape)


def pieces_of(state: dict[str, Any]) -> list[Piece]:
    """Return the tensors' pieces of a sharded state."""
    sharded, _ = save_preprocess(state, validate_access_integrity=False)
    found = []
    for item in nested_values(sharded):
        if isinstance(item, ShardedTensor):
            shape = (1,) * item.prepend_axis_num + tuple(item.local_shape)
            place = tuple(item.global_shape), item.dtype, tuple(item.global_offset), shape
            found.append(Piece(item.key, *place, is_main_replica(item.replica_id)))
    return found


def check_pieces(pieces: Iterable[Piece]) -> list[str]:
    """Return what is wrong with all ranks' pieces: gaps, parts written twice, unequal wholes."""
    by_key: dict[str, list[Piece]] = defaultdict(list)
    for piece in pieces:
        by_key[piece.key].append(piece)
    found = []
    for key, parts in by_key.items():
        wholes = {(part.whole, part.dtype) for part in parts}
        if len(wholes) > 1:
            found.append(f"ranks do not agree on {key}: {sorted(map(str, wholes))[:2]}.")
            continue
        written = [part for part in parts if part.is_written]
        places = [part.first for part in written]
        if len(set(places)) < len(places):
            twice = next(place for place in places if places.count(place) > 1)
            found.append(f"{key} is written twice at {twice}.")
        elif sum(part.size for part in written) != math.prod(parts[0].whole):
            found.append(
                f"{sum(part.size for part in written)} of {math.prod(parts[0].whole)} elements of "
                f"{key} are written."
            )
        unwritten = {part.first for part in parts} - set(places)
        if unwritten:
            found.append(f"nobody writes {key} at {min(unwritten)}, which a rank holds.")
    return found


def check_optimizer(pieces: Iterable[Piece], states: int) -> list[str]:
    """Return what is wrong with one rank's pieces of optimiser states: each lies as its weight.

    And every weight that is trained has so many.
    """
    weights: dict[tuple[str, tuple[int, ...]], Piece] = {}
    own = []
    for piece in pieces:
        if piece.key.startswith(OPTIMIZER):
            own.append(piece)
        else:
            weights[piece.key, piece.first] = piece
    found, counts = [], Counter[tuple[str, tuple[int, ...]]]()
    for state in own:
        key = state.key.split(".", 3)[3]
        counts[key, state.first] += 1
        weight = weights.get((key, state.first))
        if weight is None or (weight.whole, weight.shape) != (state.whole, state.shape):
            found.append(f"{state.key} at {state.first} is no state of a weight of this rank.")
    for key, first in weights:
        if counts[key, first] < states and not key.endswith(UNTRAINED):
            found.append(f"{key} at {first} has {counts[key, first]} states, not {states}.")
    return found


def states_of(pieces: Iterable[Piece]) -> set[str]:
    """Return the names of optimiser states."""
    keys = {piece.key for piece in pieces if piece.key.startswith(OPTIMIZER)}
    return {key.split(".", 3)[2] for key in keys}


def check_load(wanted: Iterable[Piece], saved: Iterable[Piece]) -> list[str]:
    """Return which pieces that a layout asks for are not, each element once, among the saved."""
    by_key: dict[str, list[Piece]] = defaultdict(list)
    for piece in saved:
        if piece.is_written:
            by_key[piece.key].append(piece)
    places = {key: _Places(parts) for key, parts in by_key.items()}
    found, done = [], set()
    for piece in wanted:
        if (asked := (piece.key, piece.first, piece.shape)) in done:
            continue
        done.add(asked)
        parts = by_key.get(piece.key)
        if parts is None:
            found.append(f"{piece.key} is asked for and not saved.")
        elif (parts[0].whole, parts[0].dtype) != (piece.whole, piece.dtype):
            found.append(
                f"{piece.key} is asked for as {piece.dtype} {piece.whole}, and saved as "
                f"{parts[0].dtype} {parts[0].whole}."
            )
        elif (covered := places[piece.key].covered(piece)) != piece.size:
            found.append(
                f"of {piece.key} at {piece.first}, {piece.size} elements, {covered} are saved."
            )
    return found


class _Places:
    """The saved pieces of a tensor, found by where they are along the axes of one element each."""

    def __init__(self, pieces: list[Piece]):
        self.lead = min(_lead(piece) for piece in pieces)
        self.by_lead: dict[tuple[int, ...], list[Piece]] = defaultdict(list)
        for piece in pieces:
            self.by_lead[piece.first[: self.lead]].append(piece)

    def covered(self, piece: Piece) -> int:
        """Return the elements of a piece that are saved, each as often as it is."""
        axes = [
            range(first, first + size) for first, size in zip(piece.first, piece.shape, strict=True)
        ][: self.lead]
        parts = (part for place in product(*axes) for part in self.by_lead.get(place, []))
        return sum(_common(piece, part) for part in parts)


def _lead(piece: Piece) -> int:
    """Return how many leading axes have one element: a layer's, an expert's."""
    return next((i for i, size in enumerate(piece.shape) if size > 1), len(piece.shape))


def _common(a: Piece, b: Piece) -> int:
    """Return the elements that two pieces have in common."""
    return math.prod(
        max(0, min(x + n, y + m) - max(x, y))
        for x, n, y, m in zip(a.first, a.shape, b.first, b.shape, strict=True)
    )
