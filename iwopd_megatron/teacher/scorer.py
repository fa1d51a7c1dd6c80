"""What scores samples: the protocol that embedded models and teachers behind HTTP share."""

from __future__ import annotations

from typing import Protocol

from iwopd_megatron.batch.scores import Support
from iwopd_megatron.batch.trajectory import Trajectory


class Scorer(Protocol):
    """A model that says how likely every response token is, at the rollout temperature."""

    def score_samples(
        self, samples: list[Trajectory], topk: int = 0
    ) -> tuple[list[list[float]], list[Support]]:
        """Return log-probs (nats) of every response token, and supports with `topk`. Collective.

        Log-probs are in the order of the samples, on every rank. Supports are the `topk` likeliest
        tokens at the loss tokens of this rank's micro-batches, on the last pipeline stage.
        """
        ...
