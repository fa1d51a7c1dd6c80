"""The embedded engine's step: threads, drawing and rows that leave change no answer."""

import pytest
import torch
from worlds import run_world

from iwopd_megatron.config.models import Layout
from iwopd_megatron.rollout import decoding, packed
from iwopd_megatron.rollout.drawing import draw
from iwopd_megatron.rollout.embedded import HfEngine
from iwopd_megatron.rollout.engine import Prompt, Sampling
from iwopd_megatron.rollout.packed import TILE, has_bf16_products, pack_weight
from iwopd_megatron.rollout.threads import Threads
from iwopd_megatron.runtime.local_world import local_context
from iwopd_megatron.runtime.parallel import initialise, shutdown
from iwopd_megatron.weights.hf_reader import HfTensors

has_mkl = pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="torch without MKL")
has_bf16 = pytest.mark.skipif(not has_bf16_products(), reason="a CPU without bf16 products")
DTYPES = [
    pytest.param(False, marks=has_mkl, id="fp32"),
    pytest.param(True, marks=has_bf16, id="bf16"),
]


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("in_bf16", DTYPES)
@pytest.mark.parametrize("rows", [1, 3, 4, 8, 33])
@pytest.mark.parametrize(
    ("outputs", "inputs"), [(1000, 577), (37, 19), (TILE * 6, 64), (1001, 3071)]
)
def test_not_a_bit_depends_on_the_threads(outputs, inputs, rows, in_bf16):
    weight, x = random(outputs, inputs), random(rows, 1, inputs, seed=1)
    with Threads(1) as one, torch.inference_mode():
        whole = pack_weight(weight, rows, one, in_bf16)
        expected = whole.product(x)
    assert len(whole.parts) == 1 and expected.shape == (rows, 1, outputs)
    if in_bf16:  # rounded before the sum, and after it
        weight, x = weight.bfloat16().float(), x.bfloat16().float()
    rounding = 2**-8 if in_bf16 else 1e-4
    torch.testing.assert_close(expected, x @ weight.t(), rtol=rounding, atol=1e-3)
    for count in (2, 3):
        with Threads(count) as threads, torch.inference_mode():
            shared = pack_weight(weight, rows, threads, in_bf16)
            assert len(shared.parts) == min(count, -(-outputs // TILE))
            assert torch.equal(shared.product(x), expected)


@pytest.mark.parametrize("in_bf16", DTYPES)
def test_fewer_rows_than_were_packed_for(in_bf16):
    """By the copy still: the weight itself is not read."""
    weight, x = random(100, 64), random(8, 64, seed=1)
    with Threads(1) as threads:
        whole = pack_weight(weight, 8, threads, in_bf16)
        expected = whole.product(x)[:3]
        weight.zero_()
        assert torch.equal(whole.product(x[:3]), expected) and expected.any()


def test_threads_keep_the_order_and_pass_on_errors():
    with Threads(3) as threads:
        assert threads.over(lambda part: part * 2, [1, 2, 3]) == [2, 4, 6]
        assert not any(threads.over(lambda _: torch.is_grad_enabled(), [0, 0, 0])[1:])
        with pytest.raises(ZeroDivisionError):
            threads.over(lambda part: 1 // part, [1, 0])


@pytest.mark.parametrize("size", [5, 49_157, 151_936])
@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
def test_rows_are_drawn_as_all_at_once(size, temperature):
    """Tokens and log-probs to the bit, also where a row alone fills what is drawn together."""
    logits, uniform = 3 * random(7, size), torch.rand(7, dtype=torch.float64)
    before = logits.clone()
    token, logp = draw(logits, uniform, Sampling(1, temperature))
    whole = (before / (temperature or 1.0)).log_softmax(-1)
    cdf = whole.double().exp().cumsum(-1)
    expected = torch.searchsorted(cdf, (uniform * cdf[:, -1])[:, None], right=True).squeeze(1)
    expected = expected.clamp(max=size - 1) if temperature else whole.argmax(-1)
    assert torch.equal(token, expected) and torch.equal(logits, before)
    assert torch.equal(logp, whole.gather(-1, token[:, None]).squeeze(1))


def answers(engine, prompts, kept):
    decoding.KEPT = kept
    found = engine.generate(prompts, Sampling(24, 1.0, seed=1, stream=2))
    return {one.index: (one.response_ids, one.rollout_logp) for one in found}


def leave_and_stay(folder, in_bf16, queue):
    """Answers of rows that stay to the end, that leave, in another order; and the rows' numbers."""
    initialise(Layout())
    packed.LEAST_BYTES = 0
    generator = torch.Generator().manual_seed(0)
    lengths = [3, 11, 7, 5, 1, 9, 2, 8, 4, 6] * 2
    ids = [torch.randint(0, 512, (n,), generator=generator).tolist() for n in lengths]
    prompts = [Prompt(i, one) for i, one in enumerate(ids)]
    prompts.append(Prompt(99, [5] * 30, given=21))  # may write three tokens more
    engine = HfEngine(folder, torch.float32, set(range(0, 512, 12)), 64, 2, in_bf16)
    engine.update([(name, tensor[:]) for name, tensor in HfTensors(folder).items()], 0)
    stay = answers(engine, prompts, -1)
    seen, plain = [], engine.model.packed
    engine.model.packed = lambda rows, *more: seen.append(rows) or plain(rows, *more)
    leave = answers(engine, prompts, 0.5)
    turned = answers(engine, prompts[::-1], 0.5)
    queue.put((stay, leave, turned, seen))
    shutdown()


@pytest.mark.parametrize(
    ("kind", "in_bf16"),
    [
        *((kind, False) for kind in ("moe", "dense", "tied")),
        pytest.param("dense", True, marks=has_bf16),
    ],
)
def test_rows_that_leave_change_no_answer(kind, in_bf16, request):
    folder, queue = request.getfixturevalue(f"{kind}_folder"), local_context().SimpleQueue()
    run_world(1, leave_and_stay, folder, in_bf16, queue)
    stay, leave, turned, seen = queue.get()
    assert decoding.FEW_ROWS < seen[0] <= 21 and seen[1] <= 10  # packed anew for those that go on
    assert len({len(ids) for ids, _ in stay.values()}) > 5 and len(stay[99][0]) <= 3
    for other in (leave, turned):
        assert set(other) == set(stay)
        for index, (ids, logps) in stay.items():
            assert other[index][0] == ids
            assert other[index][1] == pytest.approx(logps, abs=1e-5)


@has_bf16
def test_bf16_products_are_near_the_weights_own(dense_folder):
    """The second token's log-probs, the first that a packed weight has a part in; not the same."""
    queue = local_context().SimpleQueue()
    found = []
    for in_bf16 in (False, True):
        run_world(1, leave_and_stay, dense_folder, in_bf16, queue)
        found.append(queue.get()[0])
    pairs = [
        (a[1][1], b[1][1])
        for a, b in zip(*(one.values() for one in found), strict=True)
        if len(a[0]) > 1 and a[0][:2] == b[0][:2]
    ]
    assert len(pairs) > 10
    assert 0 < max(abs(a - b) for a, b in pairs) < 0.05
