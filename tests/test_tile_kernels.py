"""The GPU's kernels, run by Triton's interpreter, against torch's operations."""

import pytest
import torch

pytest.importorskip("triton", reason="pip install triton")

from iwopd_megatron.loss import (
    tile_kernels,
    tile_ops,
)
from iwopd_megatron.loss.linear_loss import linear_loss
from iwopd_megatron.loss.logprobs import linear_logprobs

ROWS, COLUMNS = 5, 300


@pytest.fixture(autouse=True)
def several_blocks(monkeypatch):
    monkeypatch.setattr(tile_kernels, "BLOCK", 64)


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("inv_temperature", [1.0, 1.25])
def test_statistics(dtype, inv_temperature):
    """Also of rows whose largest logit comes last, or is very large or small."""
    tile = (4 * draw(ROWS, COLUMNS)).to(dtype)
    tile[1, -1], tile[2], tile[3] = 40, tile[2] + 3e4, tile[3] - 3e4
    found = tile_kernels.statistics(tile, inv_temperature)
    logits = (tile.float() * inv_temperature).double()
    exp = (logits - logits.amax(-1, keepdim=True)).exp()
    expected = logits.amax(-1), exp.sum(-1), (exp * logits).sum(-1)
    for got, want in zip(found, expected, strict=True):
        torch.testing.assert_close(got.double(), want, rtol=2e-6, atol=1e-5)


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("with_entropy", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradient(dtype, with_entropy, count):
    """Ids twice in a row, outside the tile on either side, and a chosen one of nearly all mass."""
    tile = (3 * draw(ROWS, COLUMNS)).to(dtype)
    ids = torch.tensor([[0, 7, 7], [299, -1, 300], [5, 5, 5], [64, 63, -400], [128, 2, 9000]])
    ids, tile[2, 5] = ids[:, :count], 15
    dids, scale = draw(ROWS, count, seed=1), 1.25
    logz = (tile.float() * scale).logsumexp(-1) + torch.tensor([0, 0.5, 0, 0, 1])  # other shards'
    entropy = None
    if with_entropy:
        entropy = tile_ops.EntropyGradient(draw(ROWS, seed=2), draw(ROWS, seed=3))
    expected = tile_ops.gradient(tile.clone().float(), scale, ids, logz, dids, entropy)
    found = tile_kernels.gradient_(tile.clone(), scale, ids, logz, dids, *(entropy or (None, None)))
    assert found.dtype == dtype
    tolerance = dict(rtol=2e-6, atol=1e-6) if dtype == torch.float32 else dict(rtol=8e-3, atol=1e-6)
    torch.testing.assert_close(found.float(), expected, **tolerance)


@pytest.mark.parametrize("topk", [0, 2])
@pytest.mark.parametrize("head", ["two passes", "one pass"])
def test_the_head_with_kernels(monkeypatch, head, topk):
    targets = torch.tensor([3, 299, 0, 150, 64])
    more = torch.tensor([[3, 9], [1, 2], [4, 5], [299, 7], [64, 65]]) if topk else None

    def run():
        hidden, weight = draw(ROWS, 16).requires_grad_(), draw(COLUMNS, 16, seed=1).requires_grad_()
        options = dict(topk_ids=more, temperature=0.8, chunk_vocab=128, chunk_tokens=3)

        def loss_of(part, rows):
            dense = 0 if part.topk_logp is None else part.topk_logp.sum()
            return -(part.logp * (rows.start + 1)).sum() - dense

        if head == "one pass":
            loss, found = linear_loss(hidden, weight, targets, loss_of, **options)
        else:
            found = linear_logprobs(hidden, weight, targets, **options)
            loss = loss_of(found, slice(1, 1)) + found.entropy.sum()
        loss.backward()
        return loss.detach(), found.logp.detach(), found.entropy.detach(), hidden.grad, weight.grad

    expected = run()
    monkeypatch.setattr(tile_ops, "is_fused", lambda tile: True)
    for got, want in zip(run(), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
