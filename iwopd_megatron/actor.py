"""Run micro-batches through Megatron's pipeline schedule; turn hidden states into log-probs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from iwopd_megatron import device
from iwopd_megatron.logprobs import LogProbs, linear_logprobs
from iwopd_megatron.model import HiddenStateModel
from iwopd_megatron.parallel import Parallel
from iwopd_megatron.trajectory import MicroBatch

device.install()

from megatron.core.pipeline_parallel import get_forward_backward_func  # noqa: E402
from megatron.core.utils import unwrap_model  # noqa: E402

# (last stage's hidden states, its model chunk, batch) -> (loss, whatever the caller wants kept)
OnOutput = Callable[[torch.Tensor, HiddenStateModel, MicroBatch], tuple[torch.Tensor, Any]]

# (log-probs of the loss tokens, batch) -> (loss, sums of metrics)
Objective = Callable[[LogProbs, MicroBatch], tuple[torch.Tensor, Any]]


@dataclass(frozen=True)
class Schedule:
    """One model (its chunks, wrapped or not) under Megatron's schedule."""

    chunks: list[torch.nn.Module]
    parallel: Parallel
    temperature: float = 1.0

    def run(
        self,
        batches: list[MicroBatch],
        length: int,
        on_output: OnOutput,
        forward_only: bool = False,
    ) -> list[Any]:
        """What `on_output` kept of every micro-batch on last-stage ranks, [] elsewhere.

        Computes gradients unless `forward_only`. length: tokens of a micro-batch before the
        context-parallel cut (`trajectory.pack` returns it).
        """

        def step(iterator, chunk):
            batch = next(iterator)
            hidden = chunk(batch.tokens, batch.positions, None, packed_seq_params=batch.packed)

            def on_last_stage(hidden):
                loss, kept = on_output(hidden, unwrap_model(chunk), batch)
                return loss, torch.tensor(len(batch.rows), dtype=torch.int), kept

            return hidden, on_last_stage

        iterators = [iter(batches) for _ in self.chunks]
        with torch.set_grad_enabled(not forward_only):
            return get_forward_backward_func()(
                forward_step_func=step,
                data_iterator=iterators if len(iterators) > 1 else iterators[0],
                model=self.chunks,
                num_microbatches=len(batches),
                seq_length=length,
                micro_batch_size=1,
                forward_only=forward_only,
            )

    def accumulate(
        self, optimizer: Any, batches: list[MicroBatch], length: int, objective: Objective
    ) -> list[Any]:
        """Fresh gradients of the objective's summed losses; returns the sums of each micro-batch.

        [] except on last-stage ranks. The optimiser step is the caller's.
        """
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        optimizer.zero_grad()

        def on_output(hidden, model, batch):
            return objective(self.logprobs(hidden, model, batch), batch)

        return self.run(batches, length, on_output)

    def logprobs(
        self,
        hidden: torch.Tensor,
        model: HiddenStateModel,
        batch: MicroBatch,
        with_entropy: bool = True,
    ) -> LogProbs:
        """Log-probs (`[N]`, nats) of the targets from last-stage hidden states `[T / tp, 1, D]`."""
        return linear_logprobs(
            hidden.squeeze(1),
            model.head_weight(),
            batch.targets,
            tp_group=self.parallel.tp.group,
            sequence_parallel=self.parallel.tp.size > 1,
            rows=batch.rows,
            temperature=self.temperature,
            with_entropy=with_entropy,
        )
