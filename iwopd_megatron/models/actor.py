"""Run micro-batches through Megatron's pipeline schedule: log-probs to train on, or to score."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from iwopd_megatron.batch.objective import Objective
from iwopd_megatron.batch.packing import MicroBatch, Packer, response_places
from iwopd_megatron.batch.routing import RoutingReplay
from iwopd_megatron.batch.scores import Support
from iwopd_megatron.batch.trajectory import Trajectory
from iwopd_megatron.loss.linear_loss import linear_loss
from iwopd_megatron.loss.logprobs import LogProbs, linear_logprobs
from iwopd_megatron.models.gpt import HiddenStateModel
from iwopd_megatron.models.passed_on import check_room
from iwopd_megatron.models.router_load import RouterLoad
from iwopd_megatron.runtime import device
from iwopd_megatron.runtime.megatron import (
    MegatronModule,
    get_forward_backward_func,
    unwrap_model,
)
from iwopd_megatron.runtime.parallel import Parallel

# (last stage's hidden states, its model chunk, batch) -> (loss, whatever the caller wants kept)
OnOutput = Callable[[torch.Tensor, HiddenStateModel, MicroBatch], tuple[torch.Tensor, Any]]


@dataclass(frozen=True)
class Schedule:
    """One model's chunks under Megatron's pipeline schedule; `accumulate` needs them in DDP."""

    chunks: list[MegatronModule]
    parallel: Parallel
    temperature: float = 1.0
    replay: RoutingReplay | None = None  # of the chunks' routers
    load: RouterLoad | None = None  # likewise

    def run(
        self,
        batches: list[MicroBatch],
        length: int,
        on_output: OnOutput,
        forward_only: bool = False,
    ) -> list[Any]:
        """Return what `on_output` kept of every micro-batch on last-stage ranks, [] elsewhere.

        Computes gradients unless `forward_only`. length: tokens of a micro-batch before the
        context-parallel cut (`Packer` returns it).
        """

        if self.replay is not None:
            self.replay.restart()

        def step(iterator, chunk):
            batch = next(iterator)
            if self.replay is not None:
                self.replay.follow(batch.experts)
            if self.load is not None:
                self.load.follow(batch.is_real)
            hidden = chunk(batch.tokens, batch.positions, None, packed_seq_params=batch.packed)

            def on_last_stage(hidden):
                loss, kept = on_output(hidden, unwrap_model(chunk), batch)
                return loss, torch.tensor(len(batch.rows), dtype=torch.int), kept

            return hidden, on_last_stage

        iterators = [iter(batches) for _ in self.chunks]
        with torch.set_grad_enabled(not forward_only):
            kept = get_forward_backward_func()(
                forward_step_func=step,
                data_iterator=iterators if len(iterators) > 1 else iterators[0],
                model=self.chunks,
                num_microbatches=len(batches),
                seq_length=length,
                micro_batch_size=1,
                forward_only=forward_only,
            )
        check_room(self.chunks)
        self._forget()
        return kept

    def _forget(self) -> None:
        """Let go of what the last micro-batch left in models and hooks."""
        for chunk in self.chunks:
            unwrap_model(chunk).set_input_tensor(None)
        if self.replay is not None:
            self.replay.restart()
        if self.load is not None:
            self.load.forget()

    def accumulate(
        self, optimizer: Any, batches: list[MicroBatch], length: int, objective: Objective
    ) -> list[Any]:
        """Make fresh gradients of the summed losses; return each micro-batch's sums.

        [] except on last-stage ranks. The optimiser step is the caller's.
        """
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        optimizer.zero_grad()

        return self.run(batches, length, self.loss_of(objective))

    def loss_of(self, objective: Objective) -> OnOutput:
        """Return what makes the objective's loss and sums of the last stage's hidden states."""

        def on_output(hidden, model, batch):
            # One pass over the head needs the whole vocabulary on this rank.
            terms = objective.known_terms(batch) if self.parallel.tp.size == 1 else None
            if terms is not None:
                loss, logprobs = linear_loss(
                    hidden.squeeze(1),
                    model.head_weight(),
                    batch.targets,
                    terms.loss,
                    rows=batch.rows,
                    temperature=self.temperature,
                    topk_ids=batch.support_ids,
                )
            else:
                logprobs = self.logprobs(hidden, model, batch)
                terms = objective.terms(batch, logprobs.logp.detach())
                loss = terms.loss(logprobs)
            return loss, terms.sums(logprobs, loss)

        return on_output

    def score(
        self, samples: list[Trajectory], packer: Packer, topk: int = 0
    ) -> tuple[list[list[float]], list[Support]]:
        """Return log-probs (nats) of every response token, in the order of the samples. Collective.

        One all-reduce of an fp32 per response token. With `topk` also the K likeliest ids of this
        rank's micro-batches, those of `packer(samples)` in order, on the last stage; they stay
        where the student's loss reads them.
        """
        starts, first = response_places(samples)
        scores = torch.zeros(starts[-1], device=device.current_device())
        first = first.to(scores.device)

        def on_output(hidden, model, batch):
            found = self.logprobs(hidden, model, batch, with_entropy=False, topk=topk)
            return found.logp.sum(), (batch, found)

        kept = self.run(*packer(samples), on_output, forward_only=True)
        if self.parallel.tp.rank == 0:
            for batch, found in kept:
                scores[first[batch.owner] + batch.offset] = found.logp
        dist.all_reduce(scores)
        values = scores.tolist()
        supports = [Support(*found.known_topk()) for _, found in kept if topk]
        return [values[a:b] for a, b in zip(starts, starts[1:], strict=False)], supports

    def logprobs(
        self,
        hidden: torch.Tensor,
        model: HiddenStateModel,
        batch: MicroBatch,
        with_entropy: bool = True,
        topk: int = 0,
    ) -> LogProbs:
        """Return log-probs (`[N]`, nats) of the targets from hidden states `[T / tp, 1, D]`.

        And of the ids of the batch's support where it has one, or of the `topk` likeliest ids.
        """
        return linear_logprobs(
            hidden.squeeze(1),
            model.head_weight(),
            batch.targets,
            tp_group=self.parallel.tp.group,
            sequence_parallel=self.parallel.tp.size > 1,
            rows=batch.rows,
            temperature=self.temperature,
            with_entropy=with_entropy,
            topk_ids=batch.support_ids,
            topk=topk,
        )
