"""Rollout engines: who writes the answers. Interchangeable behind one Protocol of two methods."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from hashlib import blake2b
from typing import Protocol

import torch

from iwopd_megatron.batch.trajectory import Trajectory


@dataclass(frozen=True)
class Prompt:
    """What to continue; `index` is its place in the round."""

    index: int
    ids: list[int]
    source: str = ""  # of the problem
    given: int = 0  # last tokens of `ids` that count as the answer's own


@dataclass(frozen=True)
class Sampling:
    """How to continue; `seed` and `stream` fix every prompt's random numbers on whatever rank."""

    max_tokens: int  # of an answer, with those that its prompt gave
    temperature: float = 1.0  # 0 is greedy
    top_p: float = 1.0  # draw from the likeliest tokens of this joint probability
    seed: int = 0
    stream: int = 0  # e.g. the round
    with_experts: bool = False  # also return the experts that each token went to
    request_seed: int | None = None  # of one prompt's continuation, for engines that can use it

    def rest(self, prompt: Prompt, written: int) -> Sampling:
        """How to go on with one prompt's answer of which `written` tokens are there."""
        key = self.seed, self.stream, prompt.index, written
        seed = int.from_bytes(blake2b(repr(key).encode(), digest_size=7).digest())
        left = self.max_tokens - prompt.given - written
        return replace(self, max_tokens=left, request_seed=seed)


OnSample = Callable[[Trajectory], None]


class RolloutEngine(Protocol):
    """Collective: every rank of the trainer's world calls both methods with the same arguments."""

    def generate(
        self, prompts: list[Prompt], sampling: Sampling, on_sample: OnSample | None = None
    ) -> list[Trajectory]:
        """One answer a prompt, in order, with the engine's log-probs of its tokens (nats).

        Log-probs are those of the whole distribution at the temperature, also with top_p < 1.
        `on_sample` is called on rank 0, possibly in another thread, as each answer ends.
        """
        ...

    def update(self, weights: Iterable[tuple[str, torch.Tensor]], version: int) -> None:
        """Replace the weights by these HF-named whole tensors; answers now carry `version`."""
        ...

    def close(self) -> None:
        """Give back what the engine holds outside this process."""
        ...
