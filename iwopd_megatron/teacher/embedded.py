"""Embedded scorers: forward-only Megatron models in the trainer's processes, of sizes of their own.

An embedded teacher is one; ExOPD's base student is another.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch

from iwopd_megatron.batch.packing import Packer
from iwopd_megatron.batch.scores import Support
from iwopd_megatron.batch.trajectory import Trajectory
from iwopd_megatron.config.models import Frozen
from iwopd_megatron.hf.config import HfConfig, read_hf_config
from iwopd_megatron.models.actor import Schedule
from iwopd_megatron.models.gpt import build_model, wrap_precision
from iwopd_megatron.runtime import device
from iwopd_megatron.runtime.host import give_back
from iwopd_megatron.weights.hf_reader import HfTensors, Source, load_shards


class EmbeddedScorer:
    """A `Scorer` whose model lies in the layout of `packer`; all ranks of the world make it."""

    def __init__(
        self,
        settings: Frozen,
        packer: Packer,
        temperature: float,
        hf: HfConfig | None = None,
        sources: Mapping[str, Source] | None = None,
    ):
        """Load the model of `settings`; between calls it is in host memory if they say offload.

        packer: how samples become micro-batches; temperature: of the rollouts; hf, sources: instead
        of those of the settings' folder.
        """
        self.offload = settings.offload
        self.packer = replace(packer, budget=settings.microbatch_tokens or packer.budget)
        hf = read_hf_config(settings.hf) if hf is None else hf
        whole = HfTensors(settings.hf) if sources is None else sources
        chunks = build_model(hf, packer.parallel, settings.dtype)
        self.loaded = load_shards(chunks, whole, hf, packer.parallel, frozen=True)
        self.chunks = wrap_precision(chunks)
        for chunk in self.chunks:
            chunk.eval().requires_grad_(False)
        self.schedule = Schedule(self.chunks, packer.parallel, temperature)
        if self.offload:
            self._move("cpu")
        give_back()  # the initial weights, whose place was taken

    def score_samples(
        self, samples: list[Trajectory], topk: int = 0
    ) -> tuple[list[list[float]], list[Support]]:
        """As the protocol says, by `Schedule.score` with this model. Collective."""
        if self.offload:
            self._move(device.current_device())
        scores = self.schedule.score(samples, self.packer, topk)
        if self.offload:
            self._move("cpu")
        return scores

    def _move(self, where: torch.device | str) -> None:
        for chunk in self.chunks:
            chunk.to(where)
        device.empty_cache()
