"""Response lengths of a round, and seconds of generation with its long tail.

Lengths are log-normal, cut at the limit. All servers get the same mixture of them; requests that
do not fit into a server wait. A teacher's service scores responses as they end, so most of its work
is hidden behind generation.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from statistics import NormalDist

QUANTILES = 64  # equal shares of the responses, by length


@dataclass(frozen=True)
class Lengths:
    """Response lengths of a round in tokens, QUANTILES equally likely ones in ascending order."""

    values: tuple[float, ...]

    @classmethod
    @lru_cache
    def lognormal(cls, mean: float, limit: int, spread: float, responses: int) -> Lengths:
        """Return lengths of a log-normal distribution with this mean, cut at `limit` tokens.

        length_i = min(limit, exp(m + spread x z_i)), m = ln mean - spread^2 / 2 (so that the mean
        before the cut is `mean`), z_i = the normal quantile of (i + 1/2) / QUANTILES. The last is
        the longest expected of `responses`: the quantile of 1 - 1 / (responses + 1), if higher.
        """
        location = math.log(mean) - spread**2 / 2
        shares = [(i + 0.5) / QUANTILES for i in range(QUANTILES)]
        shares[-1] = max(shares[-1], 1 - 1 / (responses + 1))
        normal = NormalDist(location, spread)
        return cls(tuple(min(float(limit), math.exp(normal.inv_cdf(s))) for s in shares))

    @property
    def mean(self) -> float:
        """Tokens of a response after the cut, mean over the responses."""
        return sum(self.values) / QUANTILES

    @property
    def truncated(self) -> float:
        """Share of the responses that are as long as the longest, which is not counted itself."""
        return sum(v == self.values[-1] for v in self.values[:-1]) / QUANTILES


@dataclass(frozen=True)
class Generation:
    """Seconds from a round's start at which each of the QUANTILES shares of responses has ended."""

    ends: tuple[float, ...]
    lengths: Lengths

    @property
    def seconds(self) -> float:
        """Seconds until the last response has ended."""
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
    """Return when the responses of one server end.

    step(batch, context): seconds of one token for a batch; prompt: tokens; requests: of this
    server; limit: how many run at once. While more wait, a finished one is replaced at once:
    seconds = waiting / running x mean length x step(running, prompt + mean / 2). The last `limit`
    then run out, shortest first: of each length in turn, (length - the one before) x step(those
    left, prompt + the middle between both).
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
    """Return when the last response is scored, if scoring all takes `seconds` without a pause.

    = max over i of (end_i + seconds x the tokens of i and of all that end later / all tokens),
    since scoring may start only when a response has ended, and then has the later ones to do.
    prompt: tokens of a prompt, scored with every response.
    """
    weights = [prompt + length for length in generation.lengths.values]
    total, left, finish = sum(weights), 0.0, 0.0
    for end, weight in zip(reversed(generation.ends), reversed(weights), strict=True):
        left += weight / total * seconds
        finish = max(finish, end + left)
    return finish
