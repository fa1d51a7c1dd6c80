"""Two metrics lines compared, lists by position and nulls included."""

import math

import pytest


def assert_same_figures(a, b, loose=None):
    """loose: absolute tolerance by key."""
    for key in a.keys() - {"kind", "drift", "drift_deciles"}:  # drift itself is float noise
        ours, theirs = (numbers(line[key]) for line in (a, b))
        tolerance = {"rel": 1e-4, "abs": (loose or {}).get(key, 1e-6), "nan_ok": True}
        assert ours == pytest.approx(theirs, **tolerance), (key, a["round"])


def numbers(value):
    """A metric with NaN for null."""
    values = value if isinstance(value, list) else [value]
    return [math.nan if x is None else x for x in values]
