"""Optimiser states for a checkpoint where they lie, if one data-parallel rank has all of them.

Megatron's distributed optimizer collects them for its `fully_reshardable` format: it copies each
twice, also on a rank that has nobody to collect from, 24 bytes a parameter beside the 12 that the
states have. Here such a rank's states are in the checkpoint's plan as they are.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

from iwopd_megatron.runtime.megatron import (
    ShardedTensorFactory,
    megatron_distributed,
    nested_values,
)

_Sharded = megatron_distributed.DistributedOptimizer


def keep_in_place(optimizer: Any) -> None:
    """Have Megatron's optimiser plan a checkpoint without copies of what this rank has whole."""
    for part in optimizer.chained_optimizers:
        if isinstance(part, _Sharded) and part.data_parallel_group.size() == 1:
            part.sharded_param_state_fully_reshardable = partial(_states, part)


def _states(
    part: Any, model_state: dict[str, Any], is_loading: bool = False, metadata: Any = None
) -> dict[int, dict[str, Any]]:
    """Return what Megatron's method of that name returns, its tensors the living ones.

    A load fills them in place.
    """
    sharded, _ = megatron_distributed.extract_sharded_tensors_and_factories(model_state)
    of_parameter = {piece.data: piece for piece in nested_values(sharded)}
    found: dict[int, dict[str, Any]] = {}
    for buffer in part.buffers:
        for parameter in buffer.param_index_map:
            piece = of_parameter[parameter]
            states = part._get_main_param_and_optimizer_states(parameter)
            found[len(found)] = {name: _piece(piece, name, one) for name, one in states.items()}
    return found


def _piece(model_piece: Any, name: str, state: Any) -> Any:
    """Return a state of a parameter as the piece of a checkpoint that its parameter is."""
    data = state.detach().view(model_piece.data.shape)
    key = f"optimizer.state.{name}.{model_piece.key}"
    if isinstance(model_piece, ShardedTensorFactory):  # has no dtype of its own
        return replace(model_piece, key=key, data=data)
    return replace(model_piece, key=key, data=data, dtype=data.dtype)
