"""One sample: a prompt, the student's answer, and what every model says of its tokens."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy


@dataclass(frozen=True)
class Trajectory:
    """A prompt and the student's answer to it, exact token ids as the engine produced them.

    Log-probs are in nats, one a response token, at the rollout temperature; [] where nobody asked
    for them, 0 where `loss_mask` is False.
    """

    index: int  # place in the round
    prompt_ids: list[int]
    response_ids: list[int]  # EOS included unless truncated
    rollout_logp: list[float] = field(default_factory=list)  # engine
    teacher_logp: list[float] = field(default_factory=list)
    base_logp: list[float] = field(default_factory=list)  # ExOPD's base student
    old_logp: list[float] = field(default_factory=list)  # trainer, before the round's first step
    loss_mask: list[bool] | None = None  # response tokens some loss reads; None: all
    truncated: bool = False
    weight_version: int = 0
    correct: float = 0.0
    source: str = ""  # the problem's; chooses among several teachers
    # [inputs, layers, top k], the engine's experts; uint8, int16 for more than 256 experts
    experts: numpy.ndarray | None = field(default=None, compare=False, repr=False)

    @property
    def inputs(self) -> int:
        """Return the number of input tokens: all but the last, which predicts nothing."""
        return len(self.prompt_ids) + len(self.response_ids) - 1

    @property
    def is_read(self) -> list[bool]:
        """Return, for every response token, whether some loss reads it."""
        return [True] * len(self.response_ids) if self.loss_mask is None else self.loss_mask

    @property
    def loss_tokens(self) -> int:
        """Return the number of response tokens some loss reads."""
        return sum(self.is_read)

    def gaps(self) -> list[float]:
        """Return teacher minus old log-prob (else the engine's) of the loss tokens, nats."""
        old = self.old_logp or self.rollout_logp
        tokens = zip(self.teacher_logp, old, self.is_read, strict=True)
        return [teacher - own for teacher, own, is_read in tokens if is_read]

    def with_scores(self, **scores: Any) -> Trajectory:
        """Return a copy with other fields, e.g. `teacher_logp=[...]`."""
        return replace(self, **scores)

    def unread(self) -> Trajectory:
        """Return a copy that no loss reads, whose scores are 0."""
        nothing = [0.0] * len(self.response_ids)
        return replace(
            self,
            loss_mask=[False] * len(self.response_ids),
            teacher_logp=nothing if self.teacher_logp else [],
            base_logp=nothing if self.base_logp else [],
        )


def mask_tokens(
    sample: Trajectory, unread_ids: set[int], mask_truncated: bool = False
) -> Trajectory:
    """Return the sample with `unread_ids`, or all of it if truncated, left out of its loss mask."""
    if mask_truncated and sample.truncated:
        return sample.unread()
    if not unread_ids.intersection(sample.response_ids):
        return sample
    return replace(sample, loss_mask=[token not in unread_ids for token in sample.response_ids])
