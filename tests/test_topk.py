"""The dense variant's divergence, and the running top K, against whole-vocabulary formulas."""

import pytest
import torch
import torch.distributed as dist
from worlds import run_world

from iwopd_megatron.config.models import Layout
from iwopd_megatron.loss.logprobs import linear_logprobs
from iwopd_megatron.loss.topk import MIN_TAIL, topk_kl
from iwopd_megatron.runtime.parallel import initialise

N, D, V, K = 13, 7, 36, 5


def random_logp(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (2 * torch.randn(N, V, generator=generator)).log_softmax(-1)


def divergences(student, ids, teacher):
    """Every support's value `[N]` from whole distributions, in fp64."""
    p, q = student.double().exp(), teacher.double().exp()
    p_S, q_S = p.gather(1, ids), q.gather(1, ids)
    p_rest, q_rest = (1 - x.sum(1, keepdim=True) for x in (p_S, q_S))
    p_tail, q_tail = torch.cat([p_S, p_rest], 1), torch.cat([q_S, q_rest], 1)
    p_own, q_own = p_S / p_S.sum(1, keepdim=True), q_S / q_S.sum(1, keepdim=True)
    return {
        "renormalised": (p_own * (p_own / q_own).log()).sum(1),
        "tail": (p_tail * (p_tail / q_tail).log()).sum(1),
        "truncated": (p_S * (p_S / q_S).log()).sum(1),
    }


@pytest.mark.parametrize("support", ["renormalised", "tail", "truncated"])
def test_value_and_gradient(support):
    teacher, logits = random_logp(1), random_logp(2).requires_grad_()
    ids = teacher.topk(K).indices
    upstream = torch.linspace(-1, 1, N)
    kl = topk_kl(logits.log_softmax(-1).gather(1, ids), teacher.gather(1, ids), support)
    (gradient,) = torch.autograd.grad((upstream * kl).sum(), logits)
    twin = logits.detach().double().requires_grad_()
    expected = divergences(twin.log_softmax(-1), ids, teacher)[support]
    (reference,) = torch.autograd.grad((upstream * expected).sum(), twin)
    torch.testing.assert_close(kl, expected.float(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient, reference.float(), rtol=1e-5, atol=1e-6)


def test_only_proper_supports_are_least_at_the_teacher():
    """With either remedy the KL is 0 at the teacher and nowhere below; truncated goes below."""
    teacher = random_logp(1)
    ids = teacher.topk(K).indices
    own = teacher.gather(1, ids)
    for support in ("renormalised", "tail", "truncated"):
        assert topk_kl(own, own, support).abs().max() < 1e-6
    lower = own - 1.0  # probability moved off the support
    assert (topk_kl(lower, own, "renormalised").abs() < 1e-6).all()
    assert (topk_kl(lower, own, "tail") > 0.01).all()
    assert (topk_kl(lower, own, "truncated") < -0.01).all()
    for seed in range(20):
        student = random_logp(10 + seed).gather(1, ids)
        assert (topk_kl(student, own, "renormalised") >= -1e-6).all()
        assert (topk_kl(student, own, "tail") >= -1e-6).all()


def test_whole_vocabulary_as_support_is_the_whole_kl():
    teacher, student = random_logp(1), random_logp(2)
    whole = (student.exp() * (student - teacher)).sum(1)
    for support in ("renormalised", "truncated", "tail"):
        torch.testing.assert_close(topk_kl(student, teacher, support), whole, atol=1e-4, rtol=1e-4)


def test_extreme_log_probs_stay_finite():
    """A support that holds all the mass of one model and none of the other's."""
    certain = torch.tensor([[0.0, -200.0, -1e4]])
    elsewhere = torch.tensor([[-1e4, -1e4, -1e4]])
    for support in ("renormalised", "tail", "truncated"):
        for student, teacher in ((certain, elsewhere), (elsewhere, certain)):
            student = student.clone().requires_grad_()
            value = topk_kl(student, teacher, support)
            value.sum().backward()
            assert value.isfinite().all() and student.grad.isfinite().all(), support
    assert topk_kl(elsewhere, certain, "tail").item() == pytest.approx(
        -torch.tensor(MIN_TAIL).log()
    )


def test_unknown_support():
    with pytest.raises(ValueError, match="unknown support 'top'; use renormalised, tail or"):
        topk_kl(random_logp(), random_logp(), "top")


def head():
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, D, generator=generator) for n in (N, V))
    return hidden, weight, torch.randint(0, V, (N,), generator=generator)


@pytest.mark.parametrize("tile", [1, 3, 7, 36, 100])
@pytest.mark.parametrize("k", [1, K, V])
def test_found_in_tiles(tile, k):
    """Also with fewer entries in a tile than wanted, and with the whole vocabulary wanted."""
    hidden, weight, targets = head()
    expected = (hidden @ weight.t() / 0.7).log_softmax(-1).topk(k)
    found = linear_logprobs(
        hidden, weight, targets, topk=k, temperature=0.7, chunk_tokens=4, chunk_vocab=tile
    )
    assert torch.equal(found.topk_ids, expected.indices)
    torch.testing.assert_close(found.topk_logp, expected.values, rtol=1e-5, atol=2e-6)


def test_given_ids_come_back_and_both_at_once_are_refused():
    hidden, weight, targets = head()
    ids = torch.arange(N * K).view(N, K) % V
    assert linear_logprobs(hidden, weight, targets, topk_ids=ids).topk_ids is ids
    with pytest.raises(ValueError, match="topk_ids or topk, not both"):
        linear_logprobs(hidden, weight, targets, topk_ids=ids, topk=K)


def find_over_ranks(tp):
    group = initialise(Layout(tp=tp)).tp.group
    sent = []
    gather = dist.all_gather_into_tensor
    dist.all_gather_into_tensor = lambda *a, **k: (sent.append(a[1].numel()), gather(*a, **k))[1]
    hidden, weight, targets = head()
    shard = weight.chunk(tp)[group.rank()]
    found = linear_logprobs(hidden, shard, targets, topk=12, tp_group=group, chunk_vocab=5)
    expected = (hidden @ weight.t()).log_softmax(-1).topk(12)  # more than a rank of four holds
    assert sent == [N * 2 * 12]
    assert torch.equal(found.topk_ids, expected.indices)
    torch.testing.assert_close(found.topk_logp, expected.values, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("tp", [2, 4])
def test_found_over_vocabulary_shards(tp):
    run_world(tp, find_over_ranks, tp)
