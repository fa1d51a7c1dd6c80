"""Token weights against the paper's formula in NumPy: padded, packed, cut over context ranks."""

from fractions import Fraction

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from worlds import run_world

from iwopd_megatron.parallel import zigzag_index
from iwopd_megatron.weighting import RULES, token_weights, token_weights_packed

TOLERANCE = 1e-6
# rule, gamma, share, denominator: every setting that changes a weight
CASES = [
    ("uniform", 0.5, Fraction(3, 10), "exclusive"),
    ("iw", 0.5, Fraction(3, 10), "exclusive"),
    ("iw", 0.5, Fraction(3, 10), "inclusive"),
    ("iw", 0.0, Fraction(3, 10), "exclusive"),
    ("iw", 4.0, Fraction(3, 10), "exclusive"),
    ("iw", 2.0, Fraction(3, 10), "inclusive"),
    ("prefix", 0.5, Fraction(3, 10), "exclusive"),
    ("prefix", 0.5, Fraction(3, 4), "exclusive"),
    ("suffix", 0.5, Fraction(3, 10), "exclusive"),
    ("suffix", 0.5, Fraction(1, 1), "exclusive"),
]


def naive_segment(gap, rule, gamma, share, denominator):
    """Weights of one response's loss tokens, fp64, straight from method.md."""
    d, t, kept = (
        np.abs(gap),
        np.arange(len(gap)),
        -(-share.numerator * len(gap) // share.denominator),
    )
    total = d[:-1].sum() if denominator == "exclusive" else d.sum() + 1e-8
    prior = np.array([d[:k].sum() for k in t]) / total if d[:-1].any() else np.zeros(len(gap))
    return {
        "uniform": np.ones(len(gap)),
        "iw": 1 + gamma * (1 - prior),
        "prefix": (t < kept).astype(float),
        "suffix": (t >= len(gap) - kept).astype(float),
    }[rule]


def naive(gap, segments, mask, case):
    out = np.zeros(len(gap))
    for segment in np.unique(segments):
        here = (segments == segment) & mask
        out[here] = naive_segment(gap[here].astype(np.float64), *case)
    return out


def ours(gap, segments, mask, case, **kwargs):
    rule, gamma, share, denominator = case
    return token_weights_packed(
        torch.as_tensor(gap), torch.as_tensor(segments), torch.as_tensor(mask),
        rule=rule, gamma=gamma, share=float(share), denominator=denominator, **kwargs,
    )  # fmt: skip


def relative_error(got: torch.Tensor, expected: np.ndarray) -> float:
    """Largest |got - expected| / expected; a weight that should be 0 must be 0."""
    got = got.double().numpy()
    return float(
        np.max(np.abs(got - expected) / np.where(expected == 0, 1e-30, expected), initial=0)
    )


SCALES = st.sampled_from([0.0, 1e-6, 1e-3, 1.0, 1e4])


@st.composite
def packs(draw):
    """Ragged segments; each has its own magnitude of gaps, its own zeros and its own holes."""
    lengths = draw(st.lists(st.integers(1, 40), min_size=1, max_size=6))
    gaps, masks = [], []
    for length in lengths:
        random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
        gap = draw(SCALES) * random.standard_normal(length)
        gap[random.random(length) < draw(st.sampled_from([0.0, 0.5]))] = 0
        if draw(st.booleans()):
            gap[random.integers(length)] = draw(SCALES)
        gaps.append(gap.astype(np.float32))
        masks.append(random.random(length) < draw(st.sampled_from([0.0, 0.5, 1.0])))
    segments = np.repeat(np.arange(len(lengths)), lengths)
    return np.concatenate(gaps), segments, np.concatenate(masks)


@settings(max_examples=150, deadline=None)
@given(packs(), st.sampled_from(CASES))
def test_packed_equals_formula(pack, case):
    gap, segments, mask = pack
    weights = ours(gap, segments, mask, case)
    assert weights.dtype == torch.float32
    assert relative_error(weights, naive(gap, segments, mask, case)) <= TOLERANCE


@settings(max_examples=40, deadline=None)
@given(packs(), st.sampled_from([0.5, 3.0]), st.sampled_from(["exclusive", "inclusive"]))
def test_bounds(pack, gamma, denominator):
    gap, segments, mask = pack
    weights = ours(gap, segments, mask, ("iw", gamma, Fraction(1), denominator)).numpy()
    assert (weights[~mask] == 0).all()
    assert (weights[mask] >= 1).all() and (weights[mask] <= 1 + gamma).all()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_padded_equals_formula(case):
    random = np.random.default_rng(3)
    gap = random.standard_normal((5, 23)).astype(np.float32)
    mask = np.arange(23) < np.array([23, 1, 0, 10, 17])[:, None]
    mask[0, 4:9] = False
    rule, gamma, share, denominator = case
    weights = token_weights(
        torch.tensor(gap), torch.tensor(mask),
        rule=rule, gamma=gamma, share=float(share), denominator=denominator,
    )  # fmt: skip
    assert weights.shape == gap.shape
    expected = naive(gap.ravel(), np.repeat(np.arange(5), 23), mask.ravel(), case)
    assert relative_error(weights.flatten(), expected) <= TOLERANCE


def iw(gap: list[float], mask: list[bool] | None = None, **kwargs) -> list[float]:
    gap_T = torch.tensor([gap], dtype=torch.float32)
    mask_T = torch.ones_like(gap_T, dtype=torch.bool) if mask is None else torch.tensor([mask])
    return token_weights(gap_T, mask_T, **kwargs)[0].tolist()


def test_by_hand():
    assert iw([1.0, -2.0, 1.0, 5.0]) == pytest.approx([1.5, 1.375, 1.125, 1.0])
    inclusive = [1.5, 1.5 - 0.5 / 9, 1.5 - 1.5 / 9, 1.5 - 2 / 9]
    assert iw([1.0, -2.0, 1.0, 5.0], denominator="inclusive") == pytest.approx(inclusive)
    masked = iw([1.0, 100.0, -2.0, 1.0, 5.0], [True, False, True, True, True])
    assert masked == pytest.approx([1.5, 0, 1.375, 1.125, 1.0])


def test_degenerate_responses():
    assert iw([3.0]) == [1.5]  # T = 1: there is no prefix
    assert iw([0.0] * 5) == [1.5] * 5  # the student is the teacher
    assert iw([0.0, 2.0, 0.0, 0.0]) == [1.5, 1.5, 1.0, 1.0]
    assert iw([0.0, 0.0, 2.0]) == [1.5] * 3  # only the last gap, which no prefix contains
    assert iw([1.0, 2.0], [False, False]) == [0.0, 0.0]
    empty = torch.zeros(0)
    assert token_weights_packed(empty, empty.long(), empty.bool()).shape == (0,)


def test_prefix_keeps_the_ceiling_of_the_share():
    assert iw([1.0] * 25, rule="prefix", share=0.28) == [1.0] * 7 + [0.0] * 18  # 0.28 * 25 > 7
    for length, kept in ((1, 1), (3, 1), (4, 2), (10, 3), (11, 4), (20, 6), (100, 30)):
        assert iw([1.0] * length, rule="prefix") == [1.0] * kept + [0.0] * (length - kept)
        assert iw([1.0] * length, rule="suffix") == [0.0] * (length - kept) + [1.0] * kept


def test_huge_gaps_leave_small_ones_exact():
    """A huge last gap, or a segment of huge gaps before, must not wipe out a small prefix."""
    small = [1e-6, 2e-6, 3e-6, 4e-6]
    gap = torch.tensor([1e4] * 50 + [*small, 1e4], dtype=torch.float32)
    segments = torch.tensor([0] * 50 + [1] * 5)
    weights = token_weights_packed(gap, segments, torch.ones(55, dtype=torch.bool))
    assert weights[50:].tolist() == pytest.approx([1.5, 1.45, 1.35, 1.2, 1.0], rel=1e-6)


def test_long_response():
    random = np.random.default_rng(0)
    gap = random.exponential(size=100_000).astype(np.float32)
    d = np.abs(gap.astype(np.float64))
    expected = 1 + 0.5 * (1 - (np.cumsum(d) - d) / d[:-1].sum())
    mask = np.ones(len(gap), dtype=bool)
    weights = ours(gap, np.zeros(len(gap), dtype=np.int64), mask, CASES[1])
    assert relative_error(weights, expected) <= TOLERANCE


def test_trailing_segments_without_tokens():
    gap, segments = torch.tensor([1.0, 1.0, 1.0]), torch.tensor([0, 0, 2])
    mask = torch.ones(3, dtype=torch.bool)
    assert token_weights_packed(gap, segments, mask, num_segments=5).tolist() == [1.5, 1.0, 1.5]


def test_unknown_rule():
    with pytest.raises(ValueError, match="unknown weighting rule 'iww'.*uniform"):
        iw([1.0, 2.0], rule="iww")


def random_pack(random, cp):
    lengths = (2 * cp * random.integers(1, 9, size=random.integers(1, 6))).tolist()
    count = sum(lengths)
    segments = np.repeat(np.arange(len(lengths)), lengths)
    scale = np.array([0.0, 1e-6, 1.0, 1.0, 1e4])[random.integers(5, size=len(lengths))]
    gap = (scale[segments] * random.standard_normal(count)).astype(np.float32)
    mask = random.random(count) < random.choice([0.2, 0.7, 1.0], size=len(lengths))[segments]
    return lengths, gap, segments, mask


def check_context_parallel(cp: int) -> None:
    dist.init_process_group("gloo")
    calls = []
    gather = dist.all_gather_into_tensor
    dist.all_gather_into_tensor = lambda *args, **kwargs: (
        calls.append(args[1].numel()), gather(*args, **kwargs),
    )  # fmt: skip
    random = np.random.default_rng(cp)
    naive_error = 0.0
    for i in range(60):
        lengths, gap, segments, mask = random_pack(random, cp)
        case = CASES[i % len(CASES)]
        index = zigzag_index(lengths, cp, dist.get_rank()).numpy()
        whole = ours(gap, segments, mask, case).numpy()
        shard = gap[index], segments[index], mask[index]
        calls.clear()
        own = ours(*shard, case, num_segments=len(lengths), cp_group=dist.group.WORLD)
        assert calls == ([] if case[0] == "uniform" else [6 * len(lengths)])
        assert relative_error(own, whole[index].astype(np.float64)) <= TOLERANCE, (i, case)
        alone = ours(*shard, case, num_segments=len(lengths)).numpy()
        naive_error = max(naive_error, float(np.abs(alone - whole[index]).max()))
    assert naive_error > 0.1  # without the group, a shard takes itself for the whole response


@pytest.mark.parametrize("cp", [2, 4])
def test_context_parallel_equals_one_rank(cp):
    run_world(cp, check_context_parallel, cp)


def test_every_rule_is_tested():
    assert {case[0] for case in CASES} == set(RULES)
