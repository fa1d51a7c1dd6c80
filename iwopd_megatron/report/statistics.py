"""Means over seeds, their standard errors, and 95 % intervals by Student's t."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence

# With two seeds t is 12.7: an interval says next to nothing, so the two are shown instead.
ENOUGH_SEEDS = 3
# 97.5 % quantiles of Student's t for 1, 2, ... 10 degrees of freedom n; for more, Fisher's series
# 1.96 + 2.372 / n + 2.823 / n^2 is right to 0.003.
T_QUANTILES = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)


def present(values: Iterable[float | None]) -> list[float]:
    """Return the values that are known."""
    return [value for value in values if value is not None]


def mean(values: Sequence[float]) -> float:
    """Return the mean of one or more values."""
    return sum(values) / len(values)


def mean_or_none(values: Iterable[float | None]) -> float | None:
    """Return the mean of the values that are known; None where none is."""
    kept = present(values)
    return mean(kept) if kept else None


def stderr(values: Sequence[float]) -> float:
    """Return the standard error of a mean of n >= 2 values: sample standard deviation / sqrt(n)."""
    return statistics.stdev(values) / len(values) ** 0.5


def stderr_or_none(values: Iterable[float | None]) -> float | None:
    """Return the standard error over the values that are known; None for fewer than two."""
    kept = present(values)
    return stderr(kept) if len(kept) > 1 else None


def t_quantile(free: int) -> float:
    """Return the 97.5 % quantile of Student's t for `free` >= 1 degrees of freedom."""
    if free <= len(T_QUANTILES):
        return T_QUANTILES[free - 1]
    return 1.96 + 2.372 / free + 2.823 / free**2


def interval(values: Iterable[float | None]) -> list[float] | None:
    """Return the 95 % confidence interval [low, high] of the mean; None for fewer than 2 values."""
    kept = present(values)
    if len(kept) < 2:
        return None
    half = t_quantile(len(kept) - 1) * stderr(kept)
    return [mean(kept) - half, mean(kept) + half]


def welch_interval(values: list[float], others: list[float]) -> list[float] | None:
    """Return the 95 % interval of mean(values) - mean(others), independent, variances unlike.

    Degrees of freedom (Welch-Satterthwaite) are rounded down, which widens it. None for fewer
    than two values on a side.
    """
    if min(len(values), len(others)) < 2:
        return None
    parts = [stderr(x) ** 2 for x in (values, others)]
    middle, error = mean(values) - mean(others), sum(parts) ** 0.5
    if error == 0:
        return [middle, middle]
    spread = sum(p**2 / (len(x) - 1) for p, x in zip(parts, (values, others), strict=True))
    half = t_quantile(max(1, int(sum(parts) ** 2 / spread))) * error
    return [middle - half, middle + half]
