"""The embedded engine: the whole student in every rank's process, prompts split over the ranks.

It reads a Hugging Face folder's configuration; weights come under Hugging Face names. A token is
drawn by inverting the cumulative distribution at one uniform number per (seed, stream, prompt,
position), so the answer to a prompt depends neither on the number of ranks nor on its neighbours in
the batch.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy
import torch
import torch.distributed as dist

from iwopd_megatron.batch.trajectory import Trajectory
from iwopd_megatron.errors import RecipeError
from iwopd_megatron.hf.config import read_hf_config
from iwopd_megatron.rollout.decoder import Decoder
from iwopd_megatron.rollout.decoding import Batch, decode
from iwopd_megatron.rollout.drawing import uniform_numbers
from iwopd_megatron.rollout.engine import OnSample, Prompt, Sampling, Weights
from iwopd_megatron.rollout.packed import has_bf16_products
from iwopd_megatron.rollout.threads import Threads
from iwopd_megatron.runtime import device
from iwopd_megatron.runtime.host import give_back, own_cores
from iwopd_megatron.runtime.parallel import gather
from iwopd_megatron.weights.sync import WeightStream


class HfEngine:
    """A `RolloutEngine` on `Decoder` in every rank; it has no weights before the first `update`."""

    def __init__(
        self,
        folder: Path,
        dtype: torch.dtype,
        eos_ids: set[int],
        batch_size: int,
        threads: int | None = None,
        bf16_products: bool = False,
    ):
        """folder: Hugging Face's, for the model's shape; batch_size: prompts decoded together.

        threads: that decode on a CPU; default: as many as this process has cores. bf16_products:
        a step's products with fp32 weights are of bf16 numbers; RecipeError where there are none.
        """
        if bf16_products and (device.has_gpu() or not has_bf16_products()):
            where = "a GPU" if device.has_gpu() else "a CPU without bf16 instructions"
            raise RecipeError(
                f"rollout.bf16_products is not for {where}; write rollout.bf16_products=false."
            )
        on = device.current_device()
        self.model = Decoder(read_hf_config(folder), dtype, on, bf16_products)
        self.eos_ids = torch.tensor(sorted(eos_ids), device=device.current_device())
        self.batch_size = batch_size
        self.threads = 1 if device.has_gpu() else threads or own_cores()
        self.version = -1

    @torch.no_grad()
    def update(self, weights: Weights, version: int) -> None:
        """As the protocol says; RuntimeError if a tensor of the model does not come.

        Where every parameter is whole in this process there is no second copy of them: the engine
        reads the trainer's, which change with an optimiser step, right before the next `update`.
        """
        parameters = weights.in_place if isinstance(weights, WeightStream) else None
        if parameters is not None:
            self.model.view(parameters)
        else:
            self._copy(weights, version)
        self.version = version

    def _copy(self, weights: Weights, version: int) -> None:
        own = self.model.weights
        missing = set(own)
        for name, tensor in weights:
            own[name].copy_(tensor)
            missing.discard(name)
        if missing:
            raise RuntimeError(
                f"weight version {version} lacks {len(missing)} tensors, e.g. {min(missing)}."
            )

    def close(self) -> None:
        """Do nothing: all it holds is this process's memory."""

    def prefetch(
        self, prompts: list[Prompt], sampling: Sampling, on_sample: OnSample | None = None
    ) -> None:
        """Do nothing: the trainer's processes decode, and they train meanwhile."""

    def generate(
        self, prompts: list[Prompt], sampling: Sampling, on_sample: OnSample | None = None
    ) -> list[Trajectory]:
        """As the protocol says; every rank decodes its share of the prompts."""
        mine = prompts[dist.get_rank() :: dist.get_world_size()]
        own: list[Trajectory] = []
        with device.plain_torch(), Threads(self.threads) as threads:
            for start in range(0, len(mine), self.batch_size):
                part = mine[start : start + self.batch_size]
                own += self._generate_batch(part, sampling, threads)
        give_back()  # packed weights and caches
        by_index = {sample.index: sample for part in gather(own) for sample in part}
        if on_sample is not None and dist.get_rank() == 0:
            for sample in by_index.values():
                on_sample(sample)
        return [by_index[prompt.index] for prompt in prompts]

    @torch.inference_mode()
    def _generate_batch(
        self, prompts: list[Prompt], sampling: Sampling, threads: Threads
    ) -> list[Trajectory]:
        on, limit = device.current_device(), sampling.max_tokens
        sampling = replace(sampling, max_tokens=limit - min(prompt.given for prompt in prompts))
        width = max(len(prompt.ids) for prompt in prompts)
        ids = torch.zeros(len(prompts), width, dtype=torch.long)
        visible = torch.ones(len(prompts), width + sampling.max_tokens, dtype=torch.bool)
        for row, prompt in enumerate(prompts):
            ids[row, width - len(prompt.ids) :] = torch.tensor(prompt.ids)
            visible[row, : width - len(prompt.ids)] = False
        uniform = torch.from_numpy(
            numpy.stack([uniform_numbers(sampling, prompt.index) for prompt in prompts])
        )
        limits = torch.tensor([limit - prompt.given for prompt in prompts])
        batch = Batch(ids.to(on), visible.to(on), uniform.to(on), limits.to(on))
        tokens, logps = decode(self.model, batch, self.eos_ids, sampling, threads)
        return [
            self._trajectory(prompt, *(row[: limit - prompt.given] for row in rows))
            for prompt, *rows in zip(prompts, tokens.tolist(), logps.tolist(), strict=True)
        ]

    def _trajectory(self, prompt: Prompt, tokens: list[int], logps: list[float]) -> Trajectory:
        eos = set(self.eos_ids.tolist())
        length = next((i + 1 for i, token in enumerate(tokens) if token in eos), len(tokens))
        return Trajectory(
            index=prompt.index,
            prompt_ids=prompt.ids,
            response_ids=tokens[:length],
            rollout_logp=logps[:length],
            truncated=tokens[length - 1] not in eos,
            weight_version=self.version,
            source=prompt.source,
        )
