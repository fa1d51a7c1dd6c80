"""Advantage and policy loss, value and gradient, against token-by-token formulas."""

import math

import pytest
import torch

from iwopd_megatron.loss.policy import (
    AGGREGATIONS,
    importance_weight,
    is_clipped,
    opd_advantage,
    policy_loss,
    token_denominator,
)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def naive(logp, old, advantage, mask, clip, rollout, cap, denominator, dual):
    """Eq. 67 one token at a time in Python floats: the loss and its gradient by logp."""
    value, gradient = 0.0, []
    for t in range(len(logp)):
        ratio, a = math.exp(logp[t] - old[t]), advantage[t]
        clipped = min(max(ratio, 1 - clip), 1 + clip)
        scale = 1.0 if None in (rollout, cap) else min(math.exp(old[t] - rollout[t]), cap)
        scale = mask[t] * scale / denominator[t]
        term, is_free = min(ratio * a, clipped * a), ratio * a <= clipped * a
        if dual is not None and a < 0 and term < dual * a:
            term, is_free = dual * a, False
        value -= scale * term
        gradient.append(-scale * ratio * a if is_free else 0.0)
    return value, gradient


def check(
    logp, old, advantage, mask, *, clip=0.2, rollout=None, cap=5.0, denominator=None, dual=None
):
    denominator = torch.full_like(logp, 7.0) if denominator is None else denominator
    logp = logp.clone().requires_grad_()
    loss = policy_loss(
        logp,
        old,
        advantage,
        mask,
        clip=clip,
        dual_clip=dual,
        rollout_logp=rollout,
        tis_cap=cap,
        denominator=denominator,
    )
    loss.backward()
    lists = [x.tolist() for x in (logp, old, advantage, mask)]
    value, gradient = naive(
        *lists,
        clip,
        None if rollout is None else rollout.tolist(),
        cap,
        denominator.tolist(),
        dual,
    )
    assert loss.item() == pytest.approx(value, rel=1e-5, abs=1e-6)
    assert logp.grad.tolist() == pytest.approx(gradient, rel=1e-5, abs=1e-6)


def test_advantage_is_the_gap():
    teacher, old = random(9), random(9, seed=1).requires_grad_()
    advantage = opd_advantage(teacher, old)
    assert torch.equal(advantage, teacher - old) and not advantage.requires_grad


def test_extrapolated_advantage():
    teacher, old, base = random(9), random(9, seed=1), random(9, seed=2)
    torch.testing.assert_close(
        opd_advantage(teacher, old, base_logp=base, extrapolation=1.0), teacher - old
    )
    torch.testing.assert_close(
        opd_advantage(teacher, old, base_logp=base, extrapolation=1.25),
        1.25 * (teacher - base) - (old - base),
    )


def test_extrapolation_needs_the_base():
    with pytest.raises(ValueError, match="extrapolation=1.25 needs base_logp"):
        opd_advantage(random(3), random(3), extrapolation=1.25)


def test_ratio_one():
    logp, mask = random(31), random(31, seed=4) > -0.5
    check(logp, logp.clone(), random(31, seed=1), mask, rollout=random(31, seed=2) * 0.1 + logp)


def test_ratio_far_from_one():
    old, mask = random(200), random(200, seed=4) > -0.5
    logp = old + 0.5 * random(200, seed=1)
    rollout = old + 2 * random(200, seed=2)
    check(logp, old, random(200, seed=3), mask, rollout=rollout)
    check(logp, old, random(200, seed=3), mask, clip=0.05, rollout=rollout, cap=1.5)
    check(logp, old, random(200, seed=3), mask, denominator=1 + random(200, seed=5).abs())
    check(logp, old, random(200, seed=3), mask, rollout=rollout, dual=1.1)
    check(logp, old, random(200, seed=3), mask, rollout=rollout, cap=None, dual=3.0)


@pytest.mark.parametrize(
    ("log_ratio", "advantage", "value", "gradient"),
    [
        (0.5, 2.0, -2.4, 0.0),  # gone far enough up: clipped
        (0.5, -2.0, 2 * math.exp(0.5), 2 * math.exp(0.5)),  # must come back: not clipped
        (-0.5, 2.0, -2 * math.exp(-0.5), -2 * math.exp(-0.5)),
        (-0.5, -2.0, 1.6, 0.0),  # gone far enough down: clipped
        (0.1, 2.0, -2 * math.exp(0.1), -2 * math.exp(0.1)),
    ],
)
def test_clip_by_hand(log_ratio, advantage, value, gradient):
    logp = torch.tensor([log_ratio - 3], requires_grad=True)
    loss = policy_loss(
        logp, torch.tensor([-3.0]), torch.tensor([advantage]), torch.tensor([True]), denominator=1
    )
    loss.backward()
    assert loss.item() == pytest.approx(value, rel=1e-5)
    assert logp.grad.item() == pytest.approx(gradient, rel=1e-5)


@pytest.mark.parametrize(
    ("log_ratio", "advantage", "value"),
    [(2.0, -2.0, 6.0), (1.0, -2.0, 2 * math.e), (2.0, 2.0, -2.4), (-0.5, -2.0, 1.6)],
)
def test_dual_clip_by_hand(log_ratio, advantage, value):
    """Only a negative advantage whose ratio exceeds the bound, 3, is held back."""
    logp = torch.tensor([log_ratio - 3], requires_grad=True)
    old, mask = torch.tensor([-3.0]), torch.tensor([True])
    loss = policy_loss(logp, old, torch.tensor([advantage]), mask, dual_clip=3.0, denominator=1)
    loss.backward()
    assert loss.item() == pytest.approx(value, rel=1e-5)
    assert (logp.grad.item() == 0) == (value in (6.0, -2.4, 1.6))


def test_is_clipped_where_the_gradient_is_held_back():
    old, advantage = random(300), random(300, seed=3)
    logp = (old + 0.5 * random(300, seed=1)).requires_grad_()
    mask = torch.ones(300, dtype=torch.bool)
    policy_loss(logp, old, advantage, mask, denominator=1).backward()
    clipped = is_clipped(logp, old, advantage, 0.2)
    assert torch.equal(clipped, logp.grad == 0) and 50 < clipped.sum() < 250
    assert not is_clipped(old, old, advantage, 0.2).any()
    assert is_clipped(old - 9, old, -advantage.abs(), 2.0).sum() == 0  # 1 - clip is below any ratio


def test_importance_weight_is_capped_and_constant():
    old = torch.tensor([-1.0, -1.0, -1.0], requires_grad=True)
    weight = importance_weight(old, torch.tensor([-0.5, -2.0, -9.0]), 5.0)
    assert weight.tolist() == pytest.approx([math.exp(-0.5), math.exp(1), 5.0])
    assert not weight.requires_grad


def test_extreme_log_ratios_stay_finite():
    logp = torch.tensor([-1e4, 0.0], requires_grad=True)
    old = torch.tensor([0.0, -1e4])
    loss = policy_loss(
        logp,
        old,
        torch.tensor([1.0, -1.0]),
        torch.ones(2, dtype=torch.bool),
        rollout_logp=old.flip(0),
        denominator=1,
    )
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(logp.grad).all()


def test_masked_tokens_do_not_count():
    logp, old, advantage = random(8).requires_grad_(), random(8), random(8, seed=1)
    mask = torch.arange(8) < 5
    loss = policy_loss(logp, old, advantage, mask, denominator=5)
    loss.backward()
    assert (logp.grad[5:] == 0).all() and (logp.grad[:5] != 0).all()
    assert loss.item() == pytest.approx(-advantage[:5].mean().item(), rel=1e-5)


def test_token_denominator():
    assert token_denominator("token_mean", 7, 3, 50) == 50
    assert token_denominator("seq_mean_token_mean", 7, 3, 50) == 21
    assert token_denominator("seq_mean_token_sum", 7, 3, 50) == 3


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_total_does_not_depend_on_micro_batches(aggregation):
    lengths = [3, 17, 1, 8, 40]
    advantage = [random(n, seed=n) for n in lengths]
    expected = {  # at ratio 1 the objective of a token is its advantage
        "token_mean": -torch.cat(advantage).mean(),
        "seq_mean_token_mean": -torch.stack([a.mean() for a in advantage]).mean(),
        "seq_mean_token_sum": -torch.stack([a.sum() for a in advantage]).mean(),
    }[aggregation]
    for plan in ([[0, 1, 2, 3, 4]], [[0], [1], [2], [3], [4]], [[4, 0], [2, 3, 1]]):
        total = 0.0
        for batch in plan:
            logp = torch.zeros(sum(lengths[i] for i in batch))
            denominator = torch.cat(
                [
                    torch.full((n,), float(token_denominator(aggregation, n, 5, sum(lengths))))
                    for n in (lengths[i] for i in batch)
                ]
            )
            total += policy_loss(
                logp,
                logp,
                torch.cat([advantage[i] for i in batch]),
                torch.ones_like(logp, dtype=torch.bool),
                denominator=denominator,
            )
        assert total.item() == pytest.approx(expected.item(), rel=1e-5)
