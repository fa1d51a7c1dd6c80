"""A round's response lengths and how generation, with its long tail, hides the teacher's scoring.

Lengths are log-normal, cut at the limit. All servers get the same mixture of them; requests that
do not fit into a server wait.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from statistics import NormalDist

QUANTILES = 64


@dataclass(frozen=True)
class Lengths:
    """Response lengths of a round, QUANTILES equally likely ones in ascending order."""

    values: tuple[float, ...]

    @classmethod
    @lru_cache
    def lognormal(cls, mean: float, limit: int, spread: float, responses: int) -> Lengths:
        """`mean` before the cut at `limit`; the last one is the longest expected of `responses`."""
        location = math.log(mean) - spread**2 / 2
        shares = [(i + 0.5) / QUANTILES for i in range(QUANTILES)]
        shares[-1] = max(shares[-1], 1 - 1 / (responses + 1))
        normal = NormalDist(location, spread)
        return cls(tuple(min(float(limit), math.exp(normal.inv_cdf(s))) for s in shares))

    @property
    def mean(self) -> float:
        return sum(self.values) / QUANTILES

    @property
    def truncated(self) -> float:
        """Share that reaches the limit."""
        return sum(v == self.values[-1] for v in self.values[:-1]) / QUANTILES


@dataclass(frozen=True)
class Generation:
    """Times at which each of the QUANTILES shares of the responses is complete, in seconds."""

    ends: tuple[float, ...]
    lengths: Lengths

    @property
    def seconds(self) -> float:
        return self.ends[-1]

    @property
    def tail(self) -> float:
        """Share of the time in which less than a quarter of the responses is still written."""
        return 1 - self.ends[3 * QUANTILES // 4 - 1] / self.seconds


def generate(
    step: Callable[[float, float], float],
    lengths: Lengths,
    prompt: float,
    requests: float,
    limit: float,
) -> Generation:
    """One server's part of a round.

    step(batch, context): seconds a token. requests: of this server; limit: how many run at once.
    While more wait, a finished one is replaced; the last `limit` then run out, longest last.
    """
    running = min(requests, limit)
    context = prompt + lengths.mean / 2
    queue = (requests - running) * lengths.mean / running * step(running, context)
    drain, time, before = [], 0.0, 0.0
    for i, length in enumerate(lengths.values):
        alive = running * (QUANTILES - i) / QUANTILES
        time += (length - before) * step(max(1.0, alive), prompt + (length + before) / 2)
        before = length
        drain.append(time)
    waited = 1 - running / requests  # their ends are spread evenly over the queue's time

    def end(share: float) -> float:
        if share <= waited:
            return queue * share / waited
        return queue + drain[max(0, math.ceil((share - waited) / (1 - waited) * QUANTILES) - 1)]

    return Generation(tuple(end((i + 1) / QUANTILES) for i in range(QUANTILES)), lengths)


def scored_at(generation: Generation, prompt: float, seconds: float) -> float:
    """When the last response is scored, if scoring them all takes `seconds` without a pause.

    A response waits for its end and for those before it:  max_i (end_i + work from i on).
    """
    weights = [prompt + length for length in generation.lengths.values]
    total, left, finish = sum(weights), 0.0, 0.0
    for end, weight in zip(reversed(generation.ends), reversed(weights), strict=True):
        left += weight / total * seconds
        finish = max(finish, end + left)
    return finish
