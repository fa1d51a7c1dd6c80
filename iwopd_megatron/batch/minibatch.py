"""What one optimiser step trains on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from iwopd_megatron.batch.objective import Objective
from iwopd_megatron.batch.packing import MicroBatch, Packer
from iwopd_megatron.batch.scores import Support
from iwopd_megatron.batch.trajectory import Trajectory


@dataclass(frozen=True)
class Minibatch:
    """Samples with all scores their objective reads.

    `support`: a teacher's likeliest tokens, those of this rank's micro-batches in order; they never
    leave the rank whose loss reads them. Empty off the last pipeline stage, and where no loss does.
    """

    samples: list[Trajectory]
    objective: Objective
    support: Sequence[Support] = ()

    def pack(self, packer: Packer, aggregation: str) -> tuple[list[MicroBatch], int]:
        """Micro-batches with their support: the same packing in which the teacher found it."""
        batches, length = packer(self.samples, aggregation)
        if self.support:
            batches = [
                replace(batch, support=support)
                for batch, support in zip(batches, self.support, strict=True)
            ]
        return batches, length
