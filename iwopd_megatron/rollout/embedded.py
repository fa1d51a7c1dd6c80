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
from iwopd_megatron.hf.config import read_hf_config
from iwopd_megatron.rollout.decoder import Decoder
from iwopd_megatron.rollout.engine import OnSample, Prompt, Sampling, Weights
from iwopd_megatron.runtime import device
from iwopd_megatron.runtime.host_memory import give_back
from iwopd_megatron.runtime.parallel import gather
from iwopd_megatron.weights.sync import WeightStream


class HfEngine:
    """A `RolloutEngine` on `Decoder` in every rank; it has no weights before the first `update`."""

    def __init__(self, folder: Path, dtype: torch.dtype, eos_ids: set[int], batch_size: int):
        """folder: Hugging Face's, for the model's shape; batch_size: prompts decoded together."""
        self.model = Decoder(read_hf_config(folder), dtype, device.current_device())
        self.eos_ids = torch.tensor(sorted(eos_ids), device=device.current_device())
        self.batch_size = batch_size
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
        with device.plain_torch():
            for start in range(0, len(mine), self.batch_size):
                own += self._generate_batch(mine[start : start + self.batch_size], sampling)
        give_back()  # packed weights and caches
        by_index = {sample.index: sample for part in gather(own) for sample in part}
        if on_sample is not None and dist.get_rank() == 0:
            for sample in by_index.values():
                on_sample(sample)
        return [by_index[prompt.index] for prompt in prompts]

    @torch.inference_mode()
    def _generate_batch(self, prompts: list[Prompt], sampling: Sampling) -> list[Trajectory]:
        on, limit = device.current_device(), sampling.max_tokens
        sampling = replace(sampling, max_tokens=limit - min(prompt.given for prompt in prompts))
        width = max(len(prompt.ids) for prompt in prompts)
        total = width + sampling.max_tokens
        ids = torch.zeros(len(prompts), width, dtype=torch.long)
        # Left padding is never attended to.
        visible = torch.ones(len(prompts), total, dtype=torch.bool)
        for row, prompt in enumerate(prompts):
            ids[row, width - len(prompt.ids) :] = torch.tensor(prompt.ids)
            visible[row, : width - len(prompt.ids)] = False
        uniform = torch.from_numpy(
            numpy.stack([_uniform(sampling, prompt.index) for prompt in prompts])
        ).to(on)
        tokens, logps = self._decode(ids.to(on), visible.to(on), uniform, sampling)
        return [
            self._trajectory(prompt, *(row[: limit - prompt.given] for row in rows))
            for prompt, *rows in zip(prompts, tokens.tolist(), logps.tolist(), strict=True)
        ]

    def _decode(
        self, ids: torch.Tensor, visible: torch.Tensor, uniform: torch.Tensor, sampling: Sampling
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return tokens and log-probs `[B, max_tokens]`, zero after the last row's EOS.

        ids: int64 `[B, W]`, left-padded; visible: bool `[B, W + max_tokens]`, False on padding;
        uniform: `[B, max_tokens]` in [0, 1).
        """
        rows, width = ids.shape
        cache = self.model.new_cache(rows, visible.shape[1])
        tokens = ids.new_zeros(rows, sampling.max_tokens)
        logps = torch.zeros(rows, sampling.max_tokens, device=ids.device)
        done = torch.zeros(rows, dtype=torch.bool, device=ids.device)
        positions = (visible[:, :width].cumsum(1) - 1).clamp(min=0)
        is_padded = not bool(visible.all())
        start, mask = 0, _causal_mask(visible[:, :width]) if is_padded else None
        packed = None
        for step in range(sampling.max_tokens):
            logits = self.model(ids, positions, cache, start, mask, packed)
            token, logp = _sample(logits.float(), uniform[:, step], sampling)
            tokens[:, step], logps[:, step] = token, logp
            done |= torch.isin(token, self.eos_ids)
            if done.all():
                break
            if step == 0:  # after the prompts, whose pass has memory of its own
                packed = self.model.packed(rows, sampling.max_tokens)
            ids, positions, start = token[:, None], positions[:, -1:] + 1, width + step
            mask = visible[:, None, None, : start + 1] if is_padded else None
        return tokens, logps

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


def _uniform(sampling: Sampling, index: int) -> numpy.ndarray:
    """Return `[max_tokens]` numbers in [0, 1), a function of (seed, stream, index) alone."""
    key = numpy.random.SeedSequence([sampling.seed, sampling.stream, index])
    return numpy.random.Generator(numpy.random.Philox(key)).random(sampling.max_tokens)


def _causal_mask(visible: torch.Tensor) -> torch.Tensor:
    """Return the mask `[B, 1, S, S]` of left-padded prompts, `visible` being `[B, S]`.

    Padding sees itself: the softmax of a row without anything visible would be NaN.
    """
    width = visible.shape[1]
    causal = torch.ones(width, width, dtype=torch.bool, device=visible.device).tril()
    itself = torch.eye(width, dtype=torch.bool, device=visible.device)
    return (causal & (visible[:, None, :] | itself))[:, None]


def _sample(
    logits: torch.Tensor, uniform: torch.Tensor, sampling: Sampling
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw a token of each row of `[B, V]`; return ids and log-probs `[B]`.

    Log-probs are at the temperature, at 1 when greedy. uniform: `[B]` in [0, 1).
    """
    logp = (logits / (sampling.temperature or 1.0)).log_softmax(-1)
    if sampling.temperature == 0:
        token = logp.argmax(-1)
    else:
        cdf = _nucleus(logp.double().exp(), sampling.top_p).cumsum(-1)
        token = torch.searchsorted(cdf, (uniform * cdf[:, -1])[:, None], right=True).squeeze(1)
        token = token.clamp(max=logp.shape[-1] - 1)
    return token, logp.gather(-1, token[:, None]).squeeze(1)


def _nucleus(prob: torch.Tensor, top_p: float) -> torch.Tensor:
    """Return `[B, V]`, zero but at the fewest likeliest tokens whose sum reaches `top_p`."""
    if top_p == 1:
        return prob
    ordered, order = prob.sort(-1, descending=True)
    is_kept = ordered.cumsum(-1) - ordered < top_p
    return torch.zeros_like(prob).scatter(-1, order, ordered * is_kept)
