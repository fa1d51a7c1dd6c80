"""Scores against their definitions by brute force, and the interval's coverage."""

from itertools import combinations

import numpy
import pytest

from iwopd_megatron.evaluation.pass_at_k import interval, pass_at_k, summarise


@pytest.mark.parametrize("samples", [1, 2, 5, 7])
def test_pass_at_k_is_the_share_of_draws_with_a_right_one(samples):
    for right in range(samples + 1):
        grades = [1] * right + [0] * (samples - right)
        for k in range(1, samples + 1):
            draws = [max(draw) for draw in combinations(grades, k)]
            assert pass_at_k(samples, right, k) == pytest.approx(sum(draws) / len(draws))


def test_summary():
    grades = numpy.array([[1, 0, 0, 1], [0, 0, 0, 0], [1, 1, 1, 1]], dtype=float)
    found = summarise(grades)
    assert (found["problems"], found["samples"]) == (3, 4)
    assert found["mean"] == found["pass_at"]["1"] == pytest.approx(0.5)
    assert found["best"] == found["pass_at"]["4"] == pytest.approx(2 / 3)
    assert found["pass_at"]["2"] == pytest.approx((5 / 6 + 0 + 1) / 3)
    assert list(summarise(numpy.ones((2, 6)))["pass_at"]) == ["1", "2", "4", "6"]
    assert found["mean_interval"] == [0.0, 1.0]


def test_interval_is_that_of_the_mean():
    values = numpy.random.default_rng(1).random(400)
    low, high = interval(values)
    spread = 1.96 * values.std() / 20
    assert low == pytest.approx(values.mean() - spread, abs=spread / 5)
    assert high == pytest.approx(values.mean() + spread, abs=spread / 5)
    assert interval(values) == [low, high]
    assert interval(numpy.full(9, 0.25)) == pytest.approx([0.25, 0.25])


def test_interval_covers():
    """95 % intervals of 40 coin-like problems hold the true mean about 19 times in 20."""
    rng = numpy.random.default_rng(3)
    hits = 0
    for _ in range(200):
        low, high = interval((rng.random(40) < 0.4).astype(float))
        hits += low <= 0.4 <= high
    assert 0.88 <= hits / 200 <= 0.99
