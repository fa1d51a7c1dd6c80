"""What a rollout engine is: the protocol that embedded model and servers share, and its values."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from hashlib import blake2b
from typing import Protocol

import torch

from iwopd_megatron.batch.trajectory import Trajectory


@dataclass(frozen=True)
class Prompt:
    """Token ids to continue; `index` is its place in the round."""

    index: int
    ids: list[int]
    source: str = ""  # of the problem
    given: int = 0  # last tokens of `ids` that count as the answer's own


@dataclass(frozen=True)
class Sampling:
    """How to draw an answer; `seed` and `stream` fix each prompt's random numbers on any rank."""

    max_tokens: int  # of an answer, with those that its prompt gave
    temperature: float = 1.0  # 0 is greedy
    top_p: float = 1.0  # draw from the likeliest tokens of this joint probability
    seed: int = 0
    stream: int = 0  # e.g. the round
    with_experts: bool = False  # also return the experts that each token went to
    request_seed: int | None = None  # of one prompt's continuation, for engines that can use it

    def rest(self, prompt: Prompt, written: int) -> Sampling:
        """Return the settings that continue an answer of which `written` tokens are there."""
        key = self.seed, self.stream, prompt.index, written
        seed = int.from_bytes(blake2b(repr(key).encode(), digest_size=7).digest())
        left = self.max_tokens - prompt.given - written
        return replace(self, max_tokens=left, request_seed=seed)


OnSample = Callable[[Trajectory], None]
Weights = Iterable[tuple[str, torch.Tensor]]  # Hugging Face names, whole tensors; iterated again


class RolloutEngine(Protocol):
    """Writes the answers to prompts under the weights it was given last.

    Every rank of the trainer's world calls all methods, in the same order, with the same arguments.
    """

    def prefetch(
        self, prompts: list[Prompt], sampling: Sampling, on_sample: OnSample | None = None
    ) -> None:
        """Start answers that the next `generate` with this sampling returns, where possible.

        They go on while the trainer trains, under the weights of every `update` meanwhile. An
        engine that shares the trainer's processes starts nothing.
        """
        ...

    def generate(
        self, prompts: list[Prompt], sampling: Sampling, on_sample: OnSample | None = None
    ) -> list[Trajectory]:
        """Return one answer a prompt, in order, with log-probs (nats) of its tokens. Collective.

        Log-probs are those of the whole distribution at the temperature, also with top_p < 1.
        on_sample: called on rank 0, possibly in another thread, as each answer ends.
        """
        ...

    def update(self, weights: Weights, version: int) -> None:
        """Replace the weights; answers name `version` from now on. Collective.

        GateError where the engine is found not to hold them.
        """
        ...

    def close(self) -> None:
        """Give back what the engine holds outside this process; no-op when repeated."""
        ...
