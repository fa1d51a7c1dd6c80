"""Token weights against the paper's formula in NumPy: padded, packed, cut over context ranks."""

from fractions import Fraction
from typing import get_args

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from worlds import run_world

from iwopd_megatron.config.loss import WeightingRule
from iwopd_megatron.loss.weighting import (
    ANNEALS,
    DENOMINATORS,
    RULES,
    ratio_mean,
    scheduled_share,
    token_weights,
    token_weights_packed,
)
from iwopd_megatron.runtime.parallel import zigzag_index

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
    """Weights of one response's loss tokens, fp64, by Eq. 4-17 and Table 4 of arXiv 2606.22600."""
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
        torch.as_tensor(gap),
        torch.as_tensor(segments),
        torch.as_tensor(mask),
        rule=rule,
        gamma=gamma,
        share=float(share),
        denominator=denominator,
        **kwargs,
    )


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
        torch.tensor(gap),
        torch.tensor(mask),
        rule=rule,
        gamma=gamma,
        share=float(share),
        denominator=denominator,
    )
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


def test_a_gap_that_is_not_finite_names_its_sample():
    """Padded: a sentence. Packed: NaN, so that no optimiser step takes it for a weight."""
    gap = torch.ones(3, 4)
    gap[1, 2] = -torch.inf  # a teacher that rules the token out
    mask = torch.ones(3, 4, dtype=torch.bool)
    with pytest.raises(ValueError, match="sample 1: the gap of token 2 is -inf; teacher and .*"):
        token_weights(gap, mask)
    mask[1, 2] = False
    assert token_weights(gap, mask).isfinite().all()
    packed = gap.flatten(), torch.arange(3).repeat_interleave(4), torch.ones(12).bool()
    for rule in ("iw", "surrogate", "iw_signed", "log_ratio"):
        assert token_weights_packed(*packed, rule=rule)[4:8].isnan().any(), rule


def whole_on_one_rank(cp: int) -> None:
    """Segment 1 lies on rank 1 alone, the others are cut in zigzag."""
    dist.init_process_group("gloo")
    random = np.random.default_rng(0)
    gap = random.standard_normal(8 * cp + 7).astype(np.float32)
    segments = np.repeat([0, 1, 2], [4 * cp, 7, 4 * cp])
    expected = ours(gap, segments, np.ones(len(gap), bool), CASES[1]).numpy()
    first, last = (zigzag_index([4 * cp], cp, dist.get_rank()).numpy() for _ in range(2))
    middle = np.arange(7) + 4 * cp if dist.get_rank() == 1 else np.arange(0)
    index = np.concatenate([first, middle, last + 4 * cp + 7])
    shard = gap[index], segments[index], np.ones(len(index), bool)
    own = ours(*shard, CASES[1], num_segments=3, cp_group=dist.group.WORLD)
    assert relative_error(own, expected[index].astype(np.float64)) <= TOLERANCE


@pytest.mark.parametrize("cp", [2, 4])
def test_a_segment_on_one_rank_alone(cp):
    run_world(cp, whole_on_one_rank, cp)


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


def record_gathers() -> list[int]:
    """From now on every all-gather of this process appends the size of what it sends."""
    calls: list[int] = []
    gather = dist.all_gather_into_tensor
    dist.all_gather_into_tensor = lambda *args, **kwargs: (
        calls.append(args[1].numel()),
        gather(*args, **kwargs),
    )
    return calls


def check_context_parallel(cp: int) -> None:
    dist.init_process_group("gloo")
    calls = record_gathers()
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


def formula(gaps, rule, gamma, alpha, share, denominator, progress, start, end, anneal):
    """Weights of a whole batch of responses' loss tokens, fp64, by Eq. 4-17, 44-46 and Table 4."""
    prior = [np.array([g[:t].sum() for t in range(len(g))]) for g in gaps]
    ratio = [np.exp(np.clip(alpha * s, -80, 80)) for s in prior]
    longest = max(map(len, gaps), default=0)
    z = [np.mean([r[t] for r in ratio if len(r) > t]) for t in range(longest)]
    wave = (1 - np.cos(np.pi * progress)) / 2 if anneal == "cosine" else progress
    weights = []
    for gap, s, r in zip(gaps, prior, ratio, strict=True):
        t, length, changes = np.arange(len(gap)), len(gap), gap[:-1].any()
        low, high = (s.min(), s.max()) if changes else (-1, 0)
        d = np.abs(gap)
        total = d[:-1].sum() if denominator == "exclusive" else d.sum() + 1e-8
        used = np.array([d[:k].sum() for k in t]) / total if changes else 0 * s
        first = t < np.ceil(share * length - 1e-9)
        weights.append(
            {
                "surrogate": 1 - used,
                "iw_signed": 1 + gamma * (s - low) / (high - low),
                "log_ratio": (s - low) / (high - low),
                "ratio": r / z[:length],
                "ratio_blend": 1 + gamma * r / z[:length],
                "linear": 1 + gamma * (1 - t / max(length - 1, 1)),
                "prefix_boost": np.where(first, 1 + gamma, 1.0),
                "schedule": 1.0 * (t < np.ceil((start + (end - start) * wave) * length - 1e-9)),
            }[rule]
        )
    return weights


NEW_RULES = (
    "surrogate",
    "iw_signed",
    "log_ratio",
    "ratio",
    "ratio_blend",
    "linear",
    "prefix_boost",
    "schedule",
)


def random_settings(random, rule):
    return dict(
        rule=rule,
        gamma=float(random.choice([0.5, 2.0])),
        alpha=float(random.choice([1.0, 0.1, 0.01, 0.001])),
        share=float(random.choice([0.3, 0.75])),
        denominator=str(random.choice(["exclusive", "inclusive"])),
        start=float(random.choice([0.1, 0.3, 1.0])),
        end=float(random.choice([0.2, 1.0])),
        anneal=str(random.choice(["cosine", "linear"])),
    )


def close(got: torch.Tensor, expected: np.ndarray) -> bool:
    """Relative, and absolute below 1: a rescaled value near 0 is a difference of large sums."""
    return np.allclose(got.double().numpy(), expected, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("rule", NEW_RULES)
@settings(max_examples=60, deadline=None)
@given(packs(), st.integers(0, 2**32 - 1))
def test_padded_rules_equal_formula(rule, pack, seed):
    gap, segments, mask = pack
    rows, width = segments.max() + 1, np.bincount(segments).max()
    gap_BT, mask_BT = np.full((rows, width), 7e3, np.float32), np.zeros((rows, width), bool)
    column = np.concatenate([np.arange(n) for n in np.bincount(segments)])
    gap_BT[segments, column], mask_BT[segments, column] = gap, mask
    chosen = random_settings(np.random.default_rng(seed), rule)
    step = seed % 9
    weights = token_weights(
        torch.tensor(gap_BT), torch.tensor(mask_BT), step=step, total_steps=8, **chosen
    )
    gaps = [g[m].astype(np.float64) for g, m in zip(gap_BT, mask_BT, strict=True)]
    expected = formula(gaps, progress=step / 8, **chosen)
    assert weights.dtype == torch.float32 and weights.shape == gap_BT.shape
    assert (weights[~torch.tensor(mask_BT)] == 0).all()
    assert close(weights[torch.tensor(mask_BT)], np.concatenate(expected))


def check_rules_context_parallel(cp: int) -> None:
    dist.init_process_group("gloo")
    calls = record_gathers()
    random = np.random.default_rng(10 + cp)
    alone_error = dict.fromkeys(NEW_RULES, 0.0)
    for i in range(30 * len(NEW_RULES)):
        lengths, gap, segments, mask = random_pack(random, cp)
        rule = NEW_RULES[i % len(NEW_RULES)]
        chosen = random_settings(random, rule)
        gaps = [gap[(segments == k) & mask].astype(np.float64) for k in range(len(lengths))]
        expected = np.zeros(len(gap))
        expected[mask] = np.concatenate(formula(gaps, progress=0.4, **chosen))
        index = zigzag_index(lengths, cp, dist.get_rank()).numpy()
        mean = ratio_mean(gaps, chosen["alpha"])
        shard = [torch.tensor(x[index]) for x in (gap, segments, mask)]
        chosen |= dict(num_segments=len(lengths), ratio_mean=mean, step=2, total_steps=5)
        calls.clear()
        own = token_weights_packed(*shard, cp_group=dist.group.WORLD, **chosen)
        signed = rule in ("iw_signed", "log_ratio", "ratio", "ratio_blend")
        assert calls == [(12 if signed else 6) * len(lengths)], (rule, calls)
        assert close(own, expected[index]), (i, chosen)
        alone = token_weights_packed(*shard, **chosen).numpy()
        alone_error[rule] = max(alone_error[rule], float(np.abs(alone - expected[index]).max()))
    assert min(alone_error.values()) > 0.1, alone_error  # without the group: shards, not responses


@pytest.mark.parametrize("cp", [2, 4])
def test_rules_context_parallel(cp):
    run_world(cp, check_rules_context_parallel, cp)


def rules_of(gap, **kwargs):
    """Every new rule's weights of one response, gamma 0.5, share 0.3, the schedule half-way."""
    return {
        rule: iw(gap, rule=rule, alpha=1.0, step=1, total_steps=2, **kwargs) for rule in NEW_RULES
    }


def test_rules_on_degenerate_responses():
    one = rules_of([3.0])  # T = 1: no prefix
    assert one == {
        "surrogate": [1.0],
        "iw_signed": [1.5],
        "log_ratio": [1.0],
        "ratio": [1.0],
        "ratio_blend": [1.5],
        "linear": [1.5],
        "prefix_boost": [1.5],
        "schedule": [1.0],
    }
    equal = rules_of([0.0] * 4)  # S is constant: rescaled to 1
    assert equal["iw_signed"] == equal["ratio_blend"] == [1.5] * 4
    assert equal["surrogate"] == equal["log_ratio"] == equal["ratio"] == [1.0] * 4
    assert rules_of([0.0] * 3 + [9.0])["log_ratio"] == [1.0] * 4  # the last gap is in no prefix
    assert rules_of([0.0, -2.0, 0.0, 0.0])["log_ratio"] == [1.0, 1.0, 0.0, 0.0]
    assert rules_of([0.0, 2.0, 0.0, 0.0])["iw_signed"] == [1.0, 1.0, 1.5, 1.5]
    nothing = rules_of([1.0, 2.0], mask=[False, False])
    assert all(weights == [0.0, 0.0] for weights in nothing.values())
    for rule in NEW_RULES:
        kwargs = dict(rule=rule, step=1, total_steps=2, ratio_mean=ratio_mean([], 1.0))
        empty = torch.zeros(0)
        assert token_weights_packed(empty, empty.long(), empty.bool(), **kwargs).shape == (0,)


def test_ratio_by_hand():
    """Two responses of lengths 3 and 2: the third position has one, so its ratio is 1."""
    gap = torch.tensor([[1.0, 1.0, 5.0], [-1.0, 3.0, 9.0]])
    mask = torch.tensor([[True] * 3, [True, True, False]])
    e, z = np.exp(0.5), (np.exp(0.5) + np.exp(-0.5)) / 2
    weights = token_weights(gap, mask, rule="ratio", alpha=0.5)
    assert weights[0].tolist() == pytest.approx([1.0, e / z, 1.0])
    assert weights[1].tolist() == pytest.approx([1.0, 1 / e / z, 0.0])
    mean = ratio_mean([[1.0, 1.0, 5.0], [], [-1.0, 3.0]], 0.5)
    assert mean.dtype == torch.float64
    assert mean.tolist() == pytest.approx([1.0, z, np.exp(1.0)])


def test_ratio_stays_finite():
    mean = ratio_mean([[1e4] * 3, [-1e4] * 3], 1.0)
    assert mean.tolist() == [1.0, np.cosh(80), np.cosh(80)]
    weights = token_weights(
        torch.tensor([[1e4] * 3, [-1e4] * 3]), torch.ones(2, 3).bool(), rule="ratio", alpha=1.0
    )
    assert weights.tolist() == [[1.0, 2.0, 2.0], [1.0, 0.0, 0.0]]


def test_schedule_share():
    shares = [scheduled_share(step, 4, 0.2, 1.0, "linear") for step in range(6)]
    assert shares == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 1.0])
    shares = [scheduled_share(step, 4, 1.0, 0.2, "cosine") for step in range(5)]
    quarter = 0.8 * (1 - np.sqrt(0.5)) / 2
    assert shares == pytest.approx([1.0, 1.0 - quarter, 0.6, 0.2 + quarter, 0.2])


def test_signed_sums_beside_huge_ones():
    """Segments of huge gaps before, and a huge last gap, leave a small response's sums exact."""
    small = [1e-6, -3e-6, 4e-6, 2e-6]  # S = 0, 1, -2, 2, 4, all e-6
    gap = torch.tensor([1e4] * 50 + [-1e4] * 7 + [*small, 1e4], dtype=torch.float32)
    segments = torch.tensor([0] * 57 + [1] * 5)
    weights = token_weights_packed(gap, segments, torch.ones(62).bool(), rule="log_ratio")
    assert weights[57:].tolist() == pytest.approx([1 / 3, 1 / 2, 0, 2 / 3, 1], abs=1e-6)


@pytest.mark.parametrize("rule", NEW_RULES)
def test_long_response_in_every_rule(rule):
    random = np.random.default_rng(5)
    gap = random.standard_normal(100_000).astype(np.float32) - np.float32(0.1)
    d, t = gap.astype(np.float64), np.arange(100_000)
    s, used = np.cumsum(d) - d, (np.cumsum(np.abs(d)) - np.abs(d)) / np.abs(d[:-1]).sum()
    scaled, first = (s - s.min()) / (s.max() - s.min()), t < 30_000
    expected = {
        "surrogate": 1 - used,
        "iw_signed": 1 + 0.5 * scaled,
        "log_ratio": scaled,
        "ratio": np.ones(len(t)),
        "ratio_blend": np.full(len(t), 1.5),
        "linear": 1 + 0.5 * (1 - t / 99_999),
        "prefix_boost": 1 + 0.5 * first,
        "schedule": first,
    }[rule]
    weights = token_weights(
        torch.tensor(gap)[None], torch.ones(1, len(t)).bool(), rule=rule, step=0, total_steps=1
    )
    assert close(weights[0], expected)


def test_what_a_rule_needs():
    gap = torch.ones(3)
    tokens = gap, gap.long(), gap.bool()
    for rule in ("ratio", "ratio_blend"):
        with pytest.raises(ValueError, match=f"'{rule}' on packed tokens needs ratio_mean=; [^.]*"):
            token_weights_packed(*tokens, rule=rule)
    for given_steps in ({}, {"step": 1}, {"total_steps": 2}):
        with pytest.raises(ValueError, match="'schedule' needs step= and total_steps="):
            token_weights_packed(*tokens, rule="schedule", **given_steps)
    with pytest.raises(ValueError, match="unknown anneal 'cos'; use cosine or linear"):
        token_weights_packed(*tokens, rule="schedule", step=0, total_steps=1, anneal="cos")


def test_every_rule_is_tested():
    assert {case[0] for case in CASES} | set(NEW_RULES) == set(RULES)


def test_config_names_the_same_choices():
    fields = WeightingRule.model_fields
    assert set(get_args(fields["denominator"].annotation)) == set(DENOMINATORS)
    assert set(get_args(fields["anneal"].annotation)) == set(ANNEALS)


@pytest.mark.parametrize("rule", RULES)
def test_a_rule_and_its_keywords_give_the_same_weights(rule):
    gap, mask = torch.randn(4, 30, generator=torch.Generator().manual_seed(1)), torch.ones(4, 30)
    tokens, progress = (gap, mask.bool()), dict(step=1, total_steps=3)
    chosen = random_settings(np.random.default_rng(7), rule) | {"gamma": 0.9}
    ours = token_weights(*tokens, rule=WeightingRule(**chosen), **progress)
    assert torch.equal(ours, token_weights(*tokens, **chosen, **progress))
    default = token_weights(*tokens, rule=rule, **progress)
    assert torch.equal(default, token_weights(*tokens, rule=WeightingRule(rule=rule), **progress))
    changed = token_weights(*tokens, rule=WeightingRule(rule=rule), **progress, gamma=0.9)
    assert torch.equal(changed, token_weights(*tokens, rule=rule, **progress, gamma=0.9))


def test_a_setting_that_no_rule_has():
    gap = torch.ones(2, 3)
    with pytest.raises(TypeError, match="unexpected keyword argument 'gama'"):
        token_weights(gap, gap.bool(), gama=1.0)
