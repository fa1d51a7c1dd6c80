"""Operations with a backward of their own, against autograd through the plain formulas in fp64."""

import pytest
import torch
import torch.nn.functional as F

from iwopd_megatron.models.native_ops import grouped_mm, rms_norm, rotate, swiglu


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def check(function, reference, *inputs, rtol=1e-5, atol=1e-6):
    """Values and all gradients under one random upstream gradient."""
    ours = [x.clone().requires_grad_() for x in inputs]
    plain = [x.double().requires_grad_() for x in inputs]
    got, expected = function(*ours), reference(*plain)
    assert got.dtype == inputs[0].dtype
    upstream = random(*got.shape, seed=9)
    got.backward(upstream.to(got.dtype))
    expected.backward(upstream.double())
    pairs = [(got, expected), *((a.grad, b.grad) for a, b in zip(ours, plain, strict=True))]
    for a, b in pairs:
        torch.testing.assert_close(a.float(), b.float(), rtol=rtol, atol=atol)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(5, 7), (3, 1, 16), (4, 2, 3, 8)])
def test_rms_norm(shape, dtype):
    x, weight = 3 * random(*shape), 1 + 0.3 * random(shape[-1], seed=1)
    loose = {} if dtype == torch.float32 else dict(rtol=0.05, atol=0.1)
    check(
        lambda x, w: rms_norm(x, w, 1e-6),
        lambda x, w: x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * w,
        x.to(dtype),
        weight.to(dtype),
        **loose,
    )


def test_rms_norm_of_zeros_and_huge_values():
    """eps keeps a row of zeros at zero; fp32 squares of 1e15 do not overflow."""
    x = torch.stack([torch.zeros(8), torch.full((8,), 1e15)]).requires_grad_()
    out = rms_norm(x, torch.ones(8), 1e-6)
    out.sum().backward()
    assert out[0].abs().max() == 0 and torch.allclose(out[1], torch.ones(8))
    assert x.grad.isfinite().all()


def test_rotate():
    """Pairs (x_i, x_{i + d/2}) turn by the angle, as complex numbers do."""
    angle = random(6, 1, 4, seed=1)

    def reference(x):
        turned = torch.complex(*x.chunk(2, -1)) * torch.polar(torch.ones_like(angle), angle)
        return torch.cat([turned.real, turned.imag], -1)

    check(lambda x: rotate(x, angle.cos(), angle.sin()), reference, random(6, 3, 8))


def test_rotate_leaves_a_strided_input_alone():
    x = random(6, 3, 16)[..., ::2]
    before = x.clone()
    out = rotate(x, torch.zeros(6, 1, 4), torch.ones(6, 1, 4))
    assert torch.equal(x, before) and torch.equal(out, torch.cat([-x[..., 4:], x[..., :4]], -1))


@pytest.mark.parametrize("counts", [[3, 0, 5, 1], [0, 0, 0, 0], [9, 0, 0, 0]])
@pytest.mark.parametrize("sizes", [(6, 5), (8, 4)])  # torch's kernel wants rows of 16 bytes
def test_grouped_mm(counts, sizes):
    """Also for experts without tokens, and for none at all."""
    x, weight = random(sum(counts), sizes[0]), random(4, *sizes, seed=1)

    def reference(x, w):
        return torch.cat([part @ w[e] for e, part in enumerate(x.split(counts))])

    check(lambda x, w: grouped_mm(x, w, torch.tensor(counts)), reference, x, weight)


def test_grouped_mm_in_bf16():
    x, weight, counts = random(9, 6), random(3, 6, 5, seed=1), [4, 2, 3]
    check(
        lambda x, w: grouped_mm(x, w, torch.tensor(counts)),
        lambda x, w: torch.cat([part @ w[e] for e, part in enumerate(x.split(counts))]),
        x.bfloat16(),
        weight.bfloat16(),
        rtol=0.05,
        atol=0.1,
    )


def test_swiglu():
    def reference(x, scale):
        gate, up = x.chunk(2, -1)
        return F.silu(gate) * up * scale

    check(swiglu, reference, random(7, 10), random(7, 1, seed=1))
    check(swiglu, lambda x: reference(x, 1.0), random(7, 10))
