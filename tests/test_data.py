"""Prompt order: a function of the seed and one cursor, mixed by share."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from iwopd_megatron.data.problems import MixedOrder, Problem, PromptOrder


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 30), st.integers(0, 1000), st.lists(st.integers(0, 40), min_size=1, max_size=8)
)
def test_order_is_one_sequence_however_it_is_taken(count, seed, sizes):
    order = PromptOrder(count, seed)
    taken = [i for size in sizes for i in order.take(size)]
    assert order.cursor == len(taken) == sum(sizes)
    assert taken == PromptOrder(count, seed).take(len(taken))
    for start in range(0, len(taken) - count + 1, count):
        assert sorted(taken[start : start + count]) == list(range(count))
    resumed = PromptOrder(count, seed)
    resumed.cursor = sizes[0]
    assert resumed.take(len(taken) - sizes[0]) == taken[sizes[0] :]


def test_the_files_own_order():
    order = PromptOrder(3, 1, shuffle=False)
    assert order.take(4) + order.take(3) == [0, 1, 2, 0, 1, 2, 0]


def test_epochs_and_seeds_differ():
    first, second = (lambda x: (x[:50], x[50:]))(PromptOrder(50, 1).take(100))
    assert first != second and first != list(range(50))
    assert PromptOrder(50, 2).take(50) != first


def test_prompt_and_grader():
    problem = Problem("1+1?", "2", 3.0, "algebra", None, "math", "Solve: ", " In a box.")
    assert problem.prompt == "Solve: 1+1? In a box." and problem.grader == "math"
    assert Problem("1+1?", "2", 3.0, "toy").grader == "toy"


COUNTS, SHARES = [7, 30, 11], [0.7, 0.2, 0.1]


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 500), st.lists(st.integers(0, 90), min_size=1, max_size=6))
def test_mix_is_one_sequence_however_it_is_taken(seed, sizes):
    order = MixedOrder(COUNTS, SHARES, seed)
    taken = [i for size in sizes for i in order.take(size)]
    assert taken == MixedOrder(COUNTS, SHARES, seed).take(len(taken))
    resumed = MixedOrder(COUNTS, SHARES, seed)
    resumed.cursor = sizes[0]
    assert resumed.take(len(taken) - sizes[0]) == taken[sizes[0] :]


def test_mix_keeps_shares_and_every_source_its_epochs():
    taken = MixedOrder(COUNTS, SHARES, seed=5).take(1000)
    parts = [range(0, 7), range(7, 37), range(37, 48)]
    for block in range(0, 1000, 100):
        own = [sum(i in part for i in taken[block : block + 100]) for part in parts]
        assert own == [70, 20, 10]
    for part in parts:
        own = [i for i in taken if i in part]
        for start in range(0, len(own) - len(part) + 1, len(part)):
            assert sorted(own[start : start + len(part)]) == list(part)
    assert MixedOrder(COUNTS, SHARES, seed=6).take(1000) != taken


@pytest.mark.parametrize("shares", [[1, 1, 1], [2, 1], [0.005, 0.995], [1, 2, 3, 4, 5, 6, 7]])
def test_shares_are_rounded_to_whole_blocks(shares):
    order = MixedOrder([3] * len(shares), shares, seed=0)
    taken = Counter(i // 3 for i in order.take(order.BLOCK))
    assert sum(order.quotas) == order.BLOCK
    for source, share in enumerate(shares):
        assert abs(taken[source] - 100 * share / sum(shares)) < 1
