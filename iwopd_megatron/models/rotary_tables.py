"""Rotary tables of packed micro-batches: made once for each, read by all layers of a model."""

from __future__ import annotations

from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist

from iwopd_megatron.hf.rope import Rope
from iwopd_megatron.models.rotary import inverse_frequencies, turn
from iwopd_megatron.runtime import device
from iwopd_megatron.runtime.parallel import Packing, zigzag_index

Table = tuple[torch.Tensor, torch.Tensor]  # cos and sin

# Student and teacher, of different angles, may run the same micro-batch; tables go with it.
_tables: WeakKeyDictionary[Packing, dict[tuple[Rope, int, torch.dtype], Table]]
_tables = WeakKeyDictionary()


def rotary_table(
    packing: Packing, rope: Rope, head: int, dtype: torch.dtype, cp_group: dist.ProcessGroup
) -> Table:
    """Return cos and sin `[T, 1, head / 2]` of the angles of this context rank's tokens."""
    own, key = _tables.setdefault(packing, {}), (rope, head, dtype)
    if key not in own:
        place = torch.cat([torch.arange(length) for length in packing.lengths])
        place_T = place[zigzag_index(packing.lengths, cp_group.size(), cp_group.rank())]
        frequency = inverse_frequencies(rope, head, place_T.device)
        angle = (place_T[:, None].float() * frequency).unsqueeze(1).to(device.current_device())
        own[key] = turn(angle, rope, dtype)
    return own[key]
