"""What every rank writes of a checkpoint: whether the pieces are the whole, each written once.

A checkpoint's tensors are the same whatever layout wrote them, so a layout whose pieces tile them,
and that asks for the same pieces when it loads, can read what any other such layout has written.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from iwopd_megatron.runtime.megatron import (
    ShardedTensor,
    is_main_replica,
    nested_values,
    save_preprocess,
)


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


def check_optimizer(pieces: Iterable[Piece]) -> list[str]:
    """Return what is wrong with one rank's pieces of optimiser states: each lies as its weight."""
    weights, states = {}, []
    for piece in pieces:
        if piece.key.startswith("optimizer."):
            states.append(piece)
        else:
            weights[piece.key, piece.first] = piece
    found = []
    for state in states:
        key = state.key.split(".", 3)[3]
        weight = weights.get((key, state.first))
        if weight is None or (weight.whole, weight.shape) != (state.whole, state.shape):
            found.append(f"{state.key} at {state.first} is no state of a weight of this rank.")
    return found
