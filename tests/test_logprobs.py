"""The chunked vocabulary-parallel head against log_softmax, forward and backward."""

import pytest
import torch
import torch.distributed as dist
from worlds import run_world

from iwopd_megatron.config.models import Layout
from iwopd_megatron.loss.logprobs import LogProbs, linear_logprobs
from iwopd_megatron.runtime.parallel import initialise

N, D, V = 13, 7, 37
RTOL, ATOL = 1e-5, 2e-6


def make(n=N, d=D, v=V, seed=0):
    g = torch.Generator().manual_seed(seed)
    hidden, weight = torch.randn(n, d, generator=g), torch.randn(v, d, generator=g) / d**0.5
    targets = torch.randint(0, v, (n,), generator=g)
    upstream = torch.randn(2, n, generator=g)  # gradients of log-prob and entropy
    return hidden, weight, targets, upstream


def naive(hidden, weight, targets, upstream, temperature=1.0):
    """fp64 log_softmax: logp, entropy and both gradients of (upstream * [logp, entropy]).sum()."""
    hidden, weight = (x.double().requires_grad_() for x in (hidden, weight))
    log_p = (hidden @ weight.t() / temperature).log_softmax(-1)
    logp = log_p.gather(-1, targets[:, None])[:, 0]
    entropy = -(log_p.exp() * log_p).sum(-1)
    (upstream[0] * logp + upstream[1] * entropy).sum().backward()
    return [x.detach().float() for x in (logp, entropy, hidden.grad, weight.grad)]


def ours(hidden, weight, targets, upstream, **kwargs):
    hidden, weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    out = linear_logprobs(hidden, weight, targets, **kwargs)
    (upstream[0] * out.logp + upstream[1] * out.entropy).sum().backward()
    return [out.logp.detach(), out.entropy.detach(), hidden.grad, weight.grad]


TOPK = ("topk_logp", "dhidden", "dweight")


def assert_equal(
    got, expected, rtol=RTOL, atol=ATOL, names=("logp", "entropy", "dhidden", "dweight")
):
    for name, a, b in zip(names, got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("chunk", [1, 3, 5, 13, 2048])
def test_equals_log_softmax(chunk):
    data = make()
    assert_equal(ours(*data, chunk_tokens=chunk), naive(*data))


@pytest.mark.parametrize("vocab", [1, 5, 36, 37, 100])
def test_tiles_of_the_vocabulary(vocab):
    data = make()
    assert_equal(ours(*data, chunk_tokens=4, chunk_vocab=vocab), naive(*data))


def naive_topk(hidden, weight, topk_ids, upstream, temperature):
    """fp64 log-probs of the ids and both gradients of (upstream * logp).sum()."""
    hidden, weight = (x.double().requires_grad_() for x in (hidden, weight))
    logp = (hidden @ weight.t() / temperature).log_softmax(-1).gather(-1, topk_ids)
    (upstream * logp).sum().backward()
    return [x.detach().float() for x in (logp, hidden.grad, weight.grad)]


def topk_data(v=36):
    """Four ids a token, the target among them; some ids twice."""
    g = torch.Generator().manual_seed(5)
    hidden, weight, targets, _ = make(n=12, v=v)
    topk_ids = torch.cat([targets[:, None], torch.randint(0, v, (12, 3), generator=g)], 1)
    topk_ids[0] = topk_ids[0, 0]
    return hidden, weight, targets, topk_ids, torch.randn(12, 4, generator=g)


@pytest.mark.parametrize("vocab", [7, 2048])
def test_further_ids(vocab):
    hidden, weight, targets, topk_ids, upstream = topk_data()
    own, shard = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    out = linear_logprobs(
        own, shard, targets, topk_ids=topk_ids, temperature=0.7, chunk_tokens=5, chunk_vocab=vocab
    )
    assert torch.equal(out.topk_logp[:, 0], out.logp)
    (upstream * out.topk_logp).sum().backward()
    expected = naive_topk(hidden, weight, topk_ids, upstream, 0.7)
    assert_equal([out.topk_logp.detach(), own.grad, shard.grad], expected, names=TOPK)
    only_logp = linear_logprobs(hidden, weight, targets, with_entropy=False)
    assert only_logp.topk_logp is None and only_logp.entropy is None


@pytest.mark.parametrize("temperature", [0.6, 1.7])
def test_temperature(temperature):
    data = make(seed=1)
    got = ours(*data, temperature=temperature, chunk_tokens=4)
    assert_equal(got, naive(*data, temperature=temperature))


def test_log_prob_or_entropy_alone():
    hidden, weight, targets, upstream = make(seed=2)
    for keep in (torch.tensor([[1.0], [0.0]]), torch.tensor([[0.0], [1.0]])):
        data = hidden, weight, targets, upstream * keep
        assert_equal(ours(*data, chunk_tokens=4), naive(*data))


def test_rows():
    hidden, weight, _, _ = make(n=29)
    rows = torch.tensor([28, 3, 0, 17, 4])
    _, _, targets, upstream = make(n=5, seed=1)
    *expected, dhidden, dweight = naive(hidden[rows], weight, targets, upstream)
    scattered = torch.zeros_like(hidden).index_copy(0, rows, dhidden)
    got = ours(hidden, weight, targets, upstream, rows=rows, chunk_tokens=2)
    assert_equal(got, [*expected, scattered, dweight])


def test_no_rows():
    hidden, weight, _, _ = make()
    none = torch.zeros(0, dtype=torch.long)
    logp, entropy, dhidden, dweight = ours(hidden, weight, none, torch.zeros(2, 0), rows=none)
    assert logp.shape == entropy.shape == (0,) and logp.dtype == torch.float32
    assert torch.equal(dhidden, torch.zeros_like(hidden))
    assert torch.equal(dweight, torch.zeros_like(weight))


def extreme(kind: str):
    """Logits of +-1e4 mixed, all near -1e4, or all near +1e4; the targets hit both ends."""
    base = {"mixed": 0.0, "low": -1e4, "high": 1e4}[kind]
    g = torch.Generator().manual_seed(5)
    logits = base + torch.randint(-2, 3, (6, 9), generator=g).float()
    if kind == "mixed":
        logits += 1e4 * torch.randint(-1, 2, (6, 9), generator=g)
        logits[0], logits[1] = 1e4, -1e4
    weight, targets = torch.eye(9), torch.tensor([0, 1, 2, 3, 4, 5])
    return logits, weight, targets, torch.randn(2, 6, generator=g)


@pytest.mark.parametrize("kind", ["mixed", "low", "high"])
def test_extreme_logits(kind):
    """An fp32 logit of 1e4 has a spacing of 1e-3; nothing may be worse than that, or not finite."""
    data = extreme(kind)
    got = ours(*data, chunk_tokens=2)
    assert all(torch.isfinite(x).all() for x in got)
    *values, dhidden, dweight = got
    *expected_values, expected_dhidden, expected_dweight = naive(*data)
    for a, b in zip(values, expected_values, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=2e-3)
    torch.testing.assert_close(dhidden, expected_dhidden, rtol=5e-3, atol=5e-3)
    torch.testing.assert_close(dweight, expected_dweight, rtol=5e-3, atol=50.0)  # times 1e4


def test_bf16_weights():
    """bf16 in the matrix products only: results are fp32, gradients in their tensor's own dtype."""
    hidden, weight, targets, upstream = make(n=33, d=16, v=65, seed=3)
    weight = weight.bfloat16()
    got = ours(hidden, weight, targets, upstream, chunk_tokens=8)
    assert [x.dtype for x in got] == [torch.float32] * 3 + [torch.bfloat16]
    expected = naive(hidden.bfloat16(), weight, targets, upstream)
    assert_equal([x.float() for x in got], expected, rtol=0.05, atol=0.1)


def check_tensor_parallel(tp: int) -> None:
    parallel = initialise(Layout(tp=tp))
    group, rank = parallel.tp.group, parallel.tp.rank
    calls = []
    all_reduce = dist.all_reduce
    dist.all_reduce = lambda *args, **kwargs: (calls.append(1), all_reduce(*args, **kwargs))[1]
    data = hidden, weight, targets, upstream = make(n=12, v=36)
    expected = naive(*data, temperature=0.8)
    columns = slice(rank * 36 // tp, (rank + 1) * 36 // tp)
    tokens = slice(rank * 12 // tp, (rank + 1) * 12 // tp)
    for sequence_parallel in (False, True):
        for chunk in (1, 5, 2048):
            own = (hidden[tokens] if sequence_parallel else hidden).clone().requires_grad_()
            shard = weight[columns].clone().requires_grad_()
            calls.clear()
            out = linear_logprobs(
                own,
                shard,
                targets,
                tp_group=group,
                sequence_parallel=sequence_parallel,
                temperature=0.8,
                chunk_tokens=chunk,
            )
            assert len(calls) == 2  # forward, however many chunks
            (upstream[0] * out.logp + upstream[1] * out.entropy).sum().backward()
            assert len(calls) == (2 if sequence_parallel else 3)  # a reduce-scatter is not counted
            whole = expected[2][tokens] if sequence_parallel else expected[2]
            got = out.logp.detach(), out.entropy.detach(), own.grad, shard.grad
            assert_equal(got, [*expected[:2], whole, expected[3][columns]])


def check_extreme_shards(tp: int) -> None:
    """One rank's shard is 2e4 below the other's: its exponentials underflow and must not hurt."""
    group = initialise(Layout(tp=tp)).tp.group
    logits = torch.zeros(3, 8 * tp)
    logits[:, :8] = -2e4
    logits[2] = -1e4
    targets = torch.tensor([0, 8, 3])
    upstream = torch.ones(2, 3)
    expected = naive(logits, torch.eye(8 * tp), targets, upstream)
    shard = torch.eye(8 * tp).chunk(tp)[group.rank()].clone()
    logp, entropy, dhidden, _ = ours(logits, shard, targets, upstream, tp_group=group)
    torch.testing.assert_close(logp, expected[0], rtol=1e-6, atol=2e-3)
    torch.testing.assert_close(entropy, expected[1], rtol=1e-6, atol=2e-3)
    torch.testing.assert_close(dhidden, expected[2], rtol=5e-3, atol=5e-3)


def check_further_ids(tp: int) -> None:
    """The ids of one token lie on several ranks; still two all-reduces forward."""
    group = initialise(Layout(tp=tp)).tp.group
    calls = []
    all_reduce = dist.all_reduce
    dist.all_reduce = lambda *args, **kwargs: (calls.append(1), all_reduce(*args, **kwargs))[1]
    hidden, weight, targets, topk_ids, upstream = topk_data()
    own = hidden.clone().requires_grad_()
    shard = weight.chunk(tp)[group.rank()].clone().requires_grad_()
    out = linear_logprobs(own, shard, targets, topk_ids=topk_ids, tp_group=group)
    assert len(calls) == 2
    (upstream * out.topk_logp).sum().backward()
    expected = naive_topk(hidden, weight, topk_ids, upstream, 1.0)
    expected[2] = expected[2].chunk(tp)[group.rank()]
    assert_equal([out.topk_logp.detach(), own.grad, shard.grad], expected, names=TOPK)


def check_rows_and_none(tp: int) -> None:
    parallel = initialise(Layout(tp=tp))
    hidden, weight, targets, upstream = make(n=12, v=36)
    shard = weight.chunk(tp)[parallel.tp.rank]
    rows = torch.tensor([1, 4, 11])
    expected = naive(hidden[rows], weight, targets[:3], upstream[:, :3])
    logp, entropy, dhidden, dweight = ours(
        hidden, shard, targets[:3], upstream[:, :3], tp_group=parallel.tp.group, rows=rows
    )
    scattered = torch.zeros_like(hidden).index_copy(0, rows, expected[2])
    assert_equal(
        [logp, entropy, dhidden, dweight],
        [*expected[:2], scattered, expected[3].chunk(tp)[parallel.tp.rank]],
    )
    none = torch.zeros(0, dtype=torch.long)
    _, _, dhidden, dweight = ours(
        hidden, shard, none, torch.zeros(2, 0), tp_group=parallel.tp.group, rows=none
    )
    assert not dhidden.any() and not dweight.any()


CHECKS = (check_tensor_parallel, check_extreme_shards, check_further_ids, check_rows_and_none)


def check_world(tp: int) -> None:
    all_reduce = dist.all_reduce
    for check in CHECKS:
        dist.all_reduce = all_reduce
        check(tp)


@pytest.mark.parametrize("tp", [2, 4])
def test_tensor_parallel_equals_one_rank(tp):
    run_world(tp, check_world, tp)


def test_what_was_not_asked_for_is_a_sentence():
    found = LogProbs(torch.zeros(2), None)
    with pytest.raises(ValueError, match="came without entropies"):
        found.known_entropy()
    with pytest.raises(ValueError, match="of the targets alone"):
        found.known_topk()
