"""The model that learns: its shards, optimiser and schedule, and its weights for others to read."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from iwopd_megatron.batch.objective import Objective
from iwopd_megatron.batch.packing import MicroBatch, Packer
from iwopd_megatron.batch.routing import RoutingReplay
from iwopd_megatron.batch.trajectory import Trajectory
from iwopd_megatron.config.recipe import Recipe
from iwopd_megatron.hf.config import HfConfig, read_hf_config
from iwopd_megatron.models.actor import Schedule
from iwopd_megatron.models.gpt import build_model, wrap_precision
from iwopd_megatron.models.optimizer import build_optimizer, build_scheduler, wrap_data_parallel
from iwopd_megatron.models.router_load import RouterLoad
from iwopd_megatron.runtime.host import give_back
from iwopd_megatron.runtime.parallel import Parallel
from iwopd_megatron.train import checkpoint
from iwopd_megatron.train.saver import Saver
from iwopd_megatron.weights.hf_reader import HfTensors, Source, load_shards
from iwopd_megatron.weights.sync import WeightStream
from iwopd_megatron.weights.transformers_views import random_weights


class StudentModel:
    """This rank's shards of a Megatron model under training, with optimiser and schedule."""

    def __init__(
        self,
        recipe: Recipe,
        parallel: Parallel,
        hf: HfConfig | None = None,
        sources: Mapping[str, Source] | None = None,
    ):
        """Build the model and read its weights. Collective.

        hf, sources: instead of those of the recipe's folder.
        """
        settings = recipe.student
        self.parallel = parallel
        self.hf = read_hf_config(settings.hf) if hf is None else hf
        further = settings.megatron.given
        chunks = build_model(self.hf, parallel, settings.dtype, settings.recompute, further)
        whole = self.sources(recipe) if sources is None else sources
        self.loaded = load_shards(chunks, whole, self.hf, parallel)
        self.stream = WeightStream(chunks, self.hf, parallel)
        self.chunks = wrap_data_parallel(wrap_precision(chunks), recipe.train)
        self.optimizer = build_optimizer(self.chunks, recipe.train)
        self.scheduler = build_scheduler(self.optimizer, recipe.train)
        temperature = recipe.rollout.temperature if recipe.is_distilling else 1.0
        replay = RoutingReplay(self.chunks) if recipe.rollout.routing_replay else None
        experts = self.hf.num_experts
        self.load = None
        if experts:
            self.load = RouterLoad(self.chunks, self.hf.num_hidden_layers, experts)
        self.schedule = Schedule(self.chunks, parallel, temperature, replay, self.load)
        give_back()  # the parameters as they were before they moved into Megatron's buffers

    @staticmethod
    def sources(recipe: Recipe) -> Mapping[str, Any]:
        """Return the whole tensors that training starts from, by Hugging Face name."""
        settings = recipe.student
        if settings.random_init is None:
            return HfTensors(settings.hf)
        return random_weights(settings.hf, settings.random_init)

    def accumulate(self, batches: list[MicroBatch], length: int, objective: Objective) -> list[Any]:
        """Compute gradients over the micro-batches of one optimiser step. Collective.

        length: as `Packer` returns it. Returns the objective's sums of each micro-batch, [] but on
        last-stage ranks.
        """
        with self.load.counting() if self.load is not None else contextlib.nullcontext():
            kept = self.schedule.accumulate(self.optimizer, batches, length, objective)
        give_back()  # activations, before the step has temporaries
        return kept

    @property
    def expert_tokens(self) -> torch.Tensor | None:
        """`[layers, experts]`: tokens this rank's routers sent there in the last `accumulate`."""
        return self.load.tokens if self.load is not None else None

    def score(self, samples: list[Trajectory], packer: Packer) -> list[list[float]]:
        """Return log-probs (nats) of each sample's response tokens by the present weights.

        0 where no loss reads a token; at the temperature of training. Collective.
        """
        return self.schedule.score(samples, packer)[0]

    def probe(self, ids: list[int], packer: Packer) -> list[float]:
        """Return log-probs (nats, temperature 1) of ids[1:] by the present weights. Collective."""
        plain = replace(self.schedule, temperature=1.0)
        return plain.score([Trajectory(0, ids[:1], ids[1:])], packer)[0][0]

    @property
    def nbytes(self) -> int:
        """Bytes that an optimiser step changes: parameters, gradients and optimiser states."""
        own = [p for chunk in self.chunks for p in chunk.parameters()]
        states = [
            state
            for part in self.optimizer.chained_optimizers
            for states in part.optimizer.state.values()
            for state in states.values()
        ]
        gradients = sum(p.main_grad.nbytes for p in own)
        return sum(one.nbytes for one in own + states) + gradients

    @property
    def lr(self) -> float:
        """The learning rate of this round's steps."""
        return self.optimizer.param_groups[0]["lr"]

    def step(self) -> float:
        """Clip the gradients, take an AdamW step and return the norm before clipping. Collective.

        A step whose gradient norm is not finite is left out, as in the authors' code.
        """
        self.optimizer.prepare_grads()
        norm = float(self.optimizer.get_grad_norm())
        if math.isfinite(norm):
            self.optimizer.step()
        return norm

    def end_round(self) -> None:
        """Go on to the next round's learning rate."""
        self.scheduler.step(1)

    def close(self) -> None:
        """Let go of the gradients' hooks, so that the model goes with its last reference.

        A hook holds Megatron's DDP, and an autograd node the hook; DDP's list holds the nodes, and
        so do the optimizer's views of parameters: circles that Python's collector cannot see.
        """
        for chunk in self.chunks:
            chunk.grad_accs.clear()
        for part in (*self.optimizer.chained_optimizers, self.optimizer):
            vars(part).clear()

    def save(self, saver: Saver, round_number: int, more: dict[str, Any]) -> None:
        """Begin a checkpoint after this round, which keeps `more` too. Collective."""
        extra = {"round": round_number, "world": self.parallel.world} | more
        parts = self.chunks, self.optimizer, self.scheduler
        checkpoint.save(saver, *parts, extra, self.parallel)

    def restore(self, folder: Path) -> dict[str, Any]:
        """Restore a checkpoint; return its "round" and what else `save` kept. Collective."""
        parts = self.chunks, self.optimizer, self.scheduler
        return checkpoint.load(folder, *parts, self.parallel)
