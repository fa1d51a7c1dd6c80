"""The one-pass head against the two-pass one: value, gradients, log-probs, whatever the chunks."""

import pytest
import torch

from iwopd_megatron.loss.linear_loss import linear_loss
from iwopd_megatron.loss.logprobs import linear_logprobs
from iwopd_megatron.loss.policy import policy_loss
from iwopd_megatron.loss.topk import topk_kl

N, D, V, K = 29, 7, 37, 3
G = torch.Generator().manual_seed(0)
HIDDEN, WEIGHT = torch.randn(N, D, generator=G), torch.randn(V, D, generator=G)
TARGETS, IDS = (torch.randint(0, V, shape, generator=G) for shape in ((N,), (N, K)))
NOISE = torch.randn(4, N, generator=G)
TEACHER = torch.randn(N, K, generator=G) - 3


def policy(old):
    """Clips, importance weights and a denominator a token."""

    def loss(logprobs, s):
        return policy_loss(
            logprobs.logp,
            old[s],
            NOISE[1][s],
            torch.ones(len(logprobs.logp), dtype=torch.bool),
            dual_clip=1.5,
            rollout_logp=(old + NOISE[2])[s],
            denominator=1 + NOISE[3][s].abs(),
        )

    return loss


def dense(logprobs, s):
    return (NOISE[1][s].abs() * topk_kl(logprobs.topk_logp, TEACHER[s], "tail")).sum()


@pytest.mark.parametrize(("chunk", "vocab"), [(1, 37), (8, 100), (29, 5), (100, 36), (8, 1)])
@pytest.mark.parametrize("kind", ["policy", "dense"])
def test_equals_two_passes(kind, chunk, vocab):
    ids = IDS if kind == "dense" else None
    settings = dict(temperature=0.7, topk_ids=ids)
    with torch.no_grad():
        old = linear_logprobs(HIDDEN, WEIGHT, TARGETS, **settings).logp + 0.5 * NOISE[0]
    token_loss = policy(old) if kind == "policy" else dense
    results = []
    for one_pass in (True, False):
        hidden, weight = HIDDEN.clone().requires_grad_(), WEIGHT.clone().requires_grad_()
        if one_pass:
            loss, out = linear_loss(
                hidden,
                weight,
                TARGETS,
                token_loss,
                chunk_tokens=chunk,
                chunk_vocab=vocab,
                **settings,
            )
            assert not out.logp.requires_grad and not out.entropy.requires_grad
        else:
            out = linear_logprobs(hidden, weight, TARGETS, **settings)
            loss = token_loss(out, slice(None))
        (3.0 * loss).backward()  # an upstream scale reaches both gradients
        parts = (loss, out.logp, out.entropy, out.topk_logp, hidden.grad, weight.grad)
        results.append([x.detach() for x in parts if x is not None])
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=2e-5, atol=5e-6)


def test_rows_and_none():
    """Rows no loss reads get no gradient; with none at all, backward still runs."""
    for rows in (torch.tensor([28, 3, 17]), torch.zeros(0, dtype=torch.long)):
        hidden, weight = HIDDEN.clone().requires_grad_(), WEIGHT.clone().requires_grad_()
        loss, out = linear_loss(
            hidden, weight, TARGETS[rows], lambda lp, s: -lp.logp.sum(), rows=rows, chunk_tokens=2
        )
        loss.backward()
        assert out.logp.shape == rows.shape
        assert loss.item() == pytest.approx(-out.logp.sum().item(), rel=1e-6)
        read = torch.zeros(N, dtype=torch.bool).index_fill(0, rows, True)
        assert torch.equal(hidden.grad.abs().sum(1) > 0, read)
        assert weight.grad.abs().sum() > 0 or not len(rows)


@pytest.mark.parametrize("base", [-1e4, 1e4])
def test_extreme_logits(base):
    """All logits near +-1e4: finite, and as exact as fp32 logits of that size are."""
    logits = base + torch.randint(-2, 3, (6, 9), generator=G).float()
    hidden, weight = logits.clone().requires_grad_(), torch.eye(9).requires_grad_()
    targets = torch.arange(6)
    loss, out = linear_loss(hidden, weight, targets, lambda lp, s: -lp.logp.sum())
    loss.backward()
    expected = logits.double().log_softmax(-1)
    torch.testing.assert_close(out.logp, expected[targets, targets].float(), rtol=1e-6, atol=2e-3)
    gradient = expected.exp() - torch.eye(9)[:6]
    torch.testing.assert_close(hidden.grad, gradient.float(), rtol=5e-3, atol=5e-3)


def test_bf16():
    hidden, weight = HIDDEN.clone().requires_grad_(), WEIGHT.bfloat16().requires_grad_()
    loss, out = linear_loss(hidden, weight, TARGETS, lambda lp, s: -lp.logp.sum(), chunk_tokens=8)
    loss.backward()
    assert out.logp.dtype == loss.dtype == hidden.grad.dtype == torch.float32
    assert weight.grad.dtype == torch.bfloat16
    twin = [x.double().requires_grad_() for x in (HIDDEN.bfloat16(), WEIGHT.bfloat16())]
    logp = (twin[0] @ twin[1].t()).log_softmax(-1)[torch.arange(N), TARGETS]
    (-logp.sum()).backward()
    torch.testing.assert_close(out.logp, logp.float().detach(), rtol=0.05, atol=0.1)
    torch.testing.assert_close(hidden.grad, twin[0].grad.float(), rtol=0.05, atol=0.1)
    torch.testing.assert_close(weight.grad.float(), twin[1].grad.float(), rtol=0.05, atol=0.1)
