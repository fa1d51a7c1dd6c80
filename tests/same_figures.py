"""Two metrics lines compared, lists by position and nulls included."""

import math

import pytest

SHARE = 1e-4  # of a figure, or of the largest of a list: float noise that training has amplified


def assert_same_figures(a, b, loose=None):
    """loose: absolute tolerance by key."""
    for key in a.keys() - {"kind", "drift", "drift_deciles"}:  # drift itself is float noise
        ours, theirs = (numbers(line[key]) for line in (a, b))
        largest = max((abs(x) for x in theirs if isinstance(x, float) and x == x), default=0.0)
        tolerance = max(1e-6, SHARE * largest, (loose or {}).get(key, 0.0))
        expected = pytest.approx(theirs, rel=0, abs=tolerance, nan_ok=True)
        assert ours == expected, (key, a["round"])


def numbers(value):
    """A metric with NaN for null."""
    values = value if isinstance(value, list) else [value]
    return [math.nan if x is None else x for x in values]
