"""Rollout engines: who writes the answers. Interchangeable behind one Protocol of two methods."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

import torch

from iwopd_megatron.trajectory import Trajectory


@dataclass(frozen=True)
class Prompt:
    """What to continue; `index` is its place in the round."""

    index: int
    ids: list[int]


@dataclass(frozen=True)
class Sampling:
    """How to continue; `seed` and `stream` fix every prompt's random numbers on whatever rank."""

    max_tokens: int
    temperature: float = 1.0  # 0 is greedy
    top_p: float = 1.0  # draw from the likeliest tokens of this joint probability
    seed: int = 0
    stream: int = 0  # e.g. the round


class RolloutEngine(Protocol):
    """Collective: every rank of the trainer's world calls both methods with the same arguments."""

    def generate(self, prompts: list[Prompt], sampling: Sampling) -> list[Trajectory]:
        """One answer a prompt, in order, with the engine's log-probs of its tokens (nats).

        Log-probs are those of the whole distribution at the temperature, also with top_p < 1.
        """
        ...

    def update(self, weights: Iterable[tuple[str, torch.Tensor]], version: int) -> None:
        """Replace the weights by these HF-named whole tensors; answers now carry `version`."""
        ...
