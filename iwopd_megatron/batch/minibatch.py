"""One optimiser step's samples, scores and objective, and their micro-batches."""

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

    support: a teacher's likeliest tokens for each of this rank's micro-batches, in order; they stay
    on the rank whose loss reads them. Empty off the last pipeline stage and where no loss reads it.
    """

    samples: list[Trajectory]
    objective: Objective
    support: Sequence[Support] = ()

    def pack(self, packer: Packer, aggregation: str) -> tuple[list[MicroBatch], int]:
        """Return this rank's micro-batches, and the longest's tokens before the context cut.

        The packing is the one in which the teacher found the support.
        """
        batches, length = packer(self.samples, aggregation)
        if self.support:
            batches = [
                replace(batch, support=support)
                for batch, support in zip(batches, self.support, strict=True)
            ]
        return batches, length
