"""Scores of a benchmark from its grades `[P problems, n samples]`, and how sure they are.

mean@n: mean over problems of the share of right samples. best@n: share of problems with a right
one. pass@k = mean over problems of 1 - C(n-c, k) / C(n, k), unbiased for k <= n with c right ones
(Chen et al. 2021, arXiv 2107.03374, Eq. 1). Intervals: percentile bootstrap over problems.
"""

from __future__ import annotations

from math import comb
from typing import Any

import numpy

RESAMPLES = 10_000


def pass_at_k(samples: int, right: int, k: int) -> float:
    """Return the chance that k of n samples, drawn without replacement, hold a right one."""
    return 1.0 - comb(samples - right, k) / comb(samples, k)


def interval(values_P: numpy.ndarray, level: float = 0.95, seed: int = 0) -> list[float]:
    """Return [low, high] of the mean of a value a problem, by the percentile bootstrap."""
    rng = numpy.random.default_rng(seed)
    counts = rng.multinomial(len(values_P), [1 / len(values_P)] * len(values_P), size=RESAMPLES)
    means = counts @ values_P / len(values_P)
    return numpy.quantile(means, [(1 - level) / 2, (1 + level) / 2]).tolist()


def summarise(grades_Pn: numpy.ndarray) -> dict[str, Any]:
    """Return what a table or a report shows of one benchmark, for JSON."""
    problems, samples = grades_Pn.shape
    mean_P, best_P = grades_Pn.mean(1), grades_Pn.max(1)
    right_P = grades_Pn.sum(1).astype(int)
    return {
        "problems": problems,
        "samples": samples,
        "mean": float(mean_P.mean()),
        "mean_interval": interval(mean_P),
        "best": float(best_P.mean()),
        "best_interval": interval(best_P),
        "pass_at": {
            str(k): float(numpy.mean([pass_at_k(samples, c, k) for c in right_P.tolist()]))
            for k in _powers(samples)
        },
    }


def _powers(most: int) -> list[int]:
    """Return 1, 2, 4, ... and `most`."""
    return sorted({2**i for i in range(most.bit_length())} | {most})
