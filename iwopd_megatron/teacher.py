"""The embedded teacher: a forward-only Megatron model in the trainer's processes, own sizes."""

from __future__ import annotations

from itertools import accumulate

import torch
import torch.distributed as dist

from iwopd_megatron import device
from iwopd_megatron.actor import Schedule
from iwopd_megatron.config import Teacher
from iwopd_megatron.hf_io import HfTensors, load_shards
from iwopd_megatron.model import build_model, wrap_precision
from iwopd_megatron.parallel import Parallel
from iwopd_megatron.preflight import read_hf_config
from iwopd_megatron.trajectory import Trajectory, pack


class EmbeddedTeacher:
    """Scores every response token at the rollout temperature. Collective over the world."""

    def __init__(self, settings: Teacher, parallel: Parallel, temperature: float, budget: int):
        self.parallel, self.budget, self.offload = parallel, budget, settings.offload
        hf = read_hf_config(settings.hf)
        chunks = build_model(hf, parallel, settings.dtype)
        load_shards(chunks, HfTensors(settings.hf), hf, parallel)
        self.chunks = wrap_precision(chunks)
        for chunk in self.chunks:
            chunk.eval().requires_grad_(False)
        self.schedule = Schedule(self.chunks, parallel, temperature)
        if self.offload:
            self._move("cpu")

    def score(self, samples: list[Trajectory]) -> list[Trajectory]:
        """The samples with teacher log-probs (nats); one all-reduce, an fp32 per response token."""
        if self.offload:
            self._move(device.current_device())
        batches, length = pack(samples, self.parallel, self.budget)
        starts = [0, *accumulate(len(sample.response_ids) for sample in samples)]
        scores = torch.zeros(starts[-1], device=device.current_device())
        first = dict(zip((sample.index for sample in samples), starts, strict=False))

        def on_output(hidden, model, batch):
            logp = self.schedule.logprobs(hidden, model, batch, with_entropy=False).logp
            return logp.sum(), (batch, logp)

        for batch, logp in self.schedule.run(batches, length, on_output, forward_only=True):
            if self.parallel.tp.rank == 0:
                begin = torch.tensor(
                    [first[i] for i in batch.owner.tolist()], device=scores.device, dtype=torch.long
                )
                scores[begin + batch.offset] = logp
        dist.all_reduce(scores)
        if self.offload:
            self._move("cpu")
        return [
            s.scored(part) for s, part in zip(samples, _cut(scores.tolist(), starts), strict=True)
        ]

    def _move(self, where: torch.device | str) -> None:
        for chunk in self.chunks:
            chunk.to(where)
        device.empty_cache()


def _cut(values: list[float], starts: list[int]) -> list[list[float]]:
    return [values[a:b] for a, b in zip(starts, starts[1:], strict=False)]
