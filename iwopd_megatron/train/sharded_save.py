"""A sharded state of Megatron's as files, planned by all ranks and written by any process.

Megatron's own asynchronous saves are two: one that it announces to remove, and since 0.17 one that
needs another package (nvidia-resiliency-ext). Neither is used: the format is written as conversion
writes it (weights/torch_dist/writer.py), and Megatron 0.16 to 0.19 load it. What all ranks share
(the common state) is in common.pt, where every version looks; 0.19 itself puts it into the tensors'
files, where those before 0.19 do not look.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from iwopd_megatron.runtime.megatron import (
    ShardedObject,
    is_main_replica,
    nested_values,
    save_preprocess,
)
from iwopd_megatron.runtime.parallel import Parallel
from iwopd_megatron.weights.torch_dist.blob import serialise
from iwopd_megatron.weights.torch_dist.writer import (
    METADATA,
    CheckpointPlan,
    CheckpointWriter,
    Contents,
    Slot,
    write_metadata,
)


@dataclass(frozen=True)
class RankFiles:
    """The files of one rank: what goes where, with its data on the host.

    Data that is there already is not copied: whoever writes them forks first.
    """

    folder: Path
    plan: CheckpointPlan
    chunks: list[tuple[Slot, torch.Tensor]]

    def write(self) -> list[Path]:
        """Write every file; return their paths. Any process."""
        writer = CheckpointWriter(self.plan, self.folder)
        for slot, tensor in self.chunks:
            writer.write(slot, tensor)
        return writer.close()


class ShardedSave:
    """One checkpoint: planned, then written rank by rank elsewhere, then completed."""

    def __init__(self, state: dict[str, Any], folder: Path, parallel: Parallel):
        """Plan the files of this rank. Collective: Megatron checks that the pieces fit."""
        sharded, common = save_preprocess(state | {"content_metadata": METADATA})
        self._folder, self._common = folder, serialise(common)
        self._plan, self._chunks = CheckpointPlan(parallel.rank), []
        for item in nested_values(sharded):
            if not is_main_replica(item.replica_id):
                continue
            if isinstance(item, ShardedObject):
                self._plan.add_object(item.unique_key, item.data)
            else:
                self._chunks.append((self._slot(item), item.data.detach().cpu()))

    def _slot(self, tensor: Any) -> Slot:
        """Plan one ShardedTensor; the axes it is stacked on are part of the global shape."""
        assert (
            tensor.flattened_range is None
        )  # only optimiser formats that METADATA does not ask for
        sizes = (1,) * tensor.prepend_axis_num + tuple(tensor.local_shape)
        return self._plan.add(
            tensor.key, tensor.global_shape, tensor.dtype, tensor.global_offset, sizes
        )

    def take_files(self) -> RankFiles | None:
        """Return this rank's files, None where it has none to write; this keeps no data. Once."""
        chunks, self._chunks = self._chunks, []
        return RankFiles(self._folder, self._plan, chunks) if self._plan.nbytes else None

    @property
    def contents(self) -> Contents:
        """What this rank's files hold."""
        return self._plan.contents

    def complete(self, contents: Iterable[Contents]) -> None:
        """Write what says where everything is, given every rank's `contents`. One rank."""
        write_metadata(self._folder, contents, self._common)
