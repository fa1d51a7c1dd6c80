"""LM head and loss in one pass: three matrix products instead of four.

Where a token's loss depends on nothing but its own log-probs and constants known beforehand (given
old log-probs, given responses), its gradient can be formed while its logits are at hand:
dlogits = dloss/dlogp (onehot - softmax), then dhidden and dweight. Nothing is recomputed. Needs the
whole vocabulary on this rank; `logprobs.linear_logprobs` is for all other cases.
On CPUs exponentials are kept, relative to the largest logit so far, and need one factor a row and
tile to become probabilities: no logit is read twice. On GPUs the products themselves are kept, in
the weight's dtype, and become their gradient in place (tile_ops.py).
Shapes: N tokens, D hidden, V vocabulary, K scored ids, C tokens of a chunk.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from iwopd_megatron.loss import tile_ops
from iwopd_megatron.loss.head import Head, Product, add_product
from iwopd_megatron.loss.logprobs import LogProbs, default_tile, scored_ids
from iwopd_megatron.runtime import device

# (a chunk's log-probs, its place among the tokens) -> the sum of its tokens' losses
TokenLoss = Callable[[LogProbs, slice], torch.Tensor]

# Rows whose logits are kept. Each chunk reads the head and writes its gradient once more.
CPU_CHUNK, GPU_CHUNK = 512, 2048


def linear_loss(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    token_loss: TokenLoss,
    *,
    rows: torch.Tensor | None = None,
    temperature: float = 1.0,
    topk_ids: torch.Tensor | None = None,
    chunk_tokens: int | None = None,
    chunk_vocab: int | None = None,
) -> tuple[torch.Tensor, LogProbs]:
    """Return the summed loss, differentiable in `hidden` and `weight`, and detached log-probs.

    hidden: `[N, D]`; weight: `[V, D]`, the whole head; targets, rows, topk_ids: as for
    `linear_logprobs`. `token_loss` is differentiated in the `logp` and `topk_logp` it is given.
    Workspace: `chunk_tokens` rows of logits (fp32, on GPUs the weight's dtype); and the two
    gradients, fp32, until backward.
    """
    if rows is not None:
        hidden = hidden.index_select(0, rows)
    chunk = chunk_tokens or (GPU_CHUNK if device.has_gpu_kernels() else CPU_CHUNK)
    default = default_tile()
    tile = default[0], chunk_vocab or default[1]
    loss, logp, entropy, topk_logp = _LinearLoss.apply(
        hidden.to(weight.dtype),
        weight,
        scored_ids(targets, topk_ids),
        1 / temperature,
        chunk,
        tile,
        token_loss,
        topk_ids,
    )
    return loss, LogProbs(logp, entropy, topk_logp, topk_ids)


class _Chunk:
    """A chunk of tokens: exponentials over the vocabulary, tile after tile; sums fp32 `[C]`."""

    def __init__(self, head: Head, ids_CK: torch.Tensor, workspace: torch.Tensor):
        self.head, self.ids_CK = head, ids_CK
        self.sum_C, self.weighted_C = workspace.new_zeros(2, len(ids_CK))
        self.max_C = torch.full_like(self.sum_C, -torch.inf)
        self.found_CK = torch.zeros(ids_CK.shape, device=workspace.device)
        # (tokens, vocabulary, exponentials, the logits they are relative to)
        self.tiles: list[tuple[slice, slice, torch.Tensor, torch.Tensor]] = []
        start = 0
        for s, v in head.tiles():
            shape = s.stop - s.start, v.stop - v.start
            exp_CU = workspace[start : start + shape[0] * shape[1]].view(shape)
            self.tiles.append((s, v, exp_CU, self._fill(exp_CU, s, v)))
            start += exp_CU.numel()

    def _fill(self, exp_CU: torch.Tensor, s: slice, v: slice) -> torch.Tensor:
        tile_CU, scale = self.head.product(s, v), self.head.inv_temperature
        self.found_CK[s] += tile_ops.found(tile_CU, scale, self.ids_CK[s] - v.start)
        logits_CU = tile_ops.scaled(tile_CU, scale)
        peak_C = torch.maximum(self.max_C[s], logits_CU.amax(-1))
        torch.exp(logits_CU.sub_(peak_C[:, None]), out=exp_CU)
        # sums of exp and of exp * (logit - peak); the older ones move to the new peak
        shift_C = (self.max_C[s] - peak_C).clamp_(min=-1e30)
        rescale_C = shift_C.exp()
        older_C = (self.weighted_C[s] + shift_C * self.sum_C[s]) * rescale_C
        self.weighted_C[s] = older_C + torch.linalg.vecdot(exp_CU, logits_CU)
        self.sum_C[s] = self.sum_C[s] * rescale_C + exp_CU.sum(-1)
        self.max_C[s] = peak_C
        return peak_C

    def add_gradients(
        self,
        logz_C: torch.Tensor,
        dlogp_CK: torch.Tensor,
        dhidden_CD: torch.Tensor,
        dweight_VD: torch.Tensor,
    ) -> None:
        """Add to both gradients, fp32, those of sum(dlogp * log-prob of ids)."""
        dlogz_C = dlogp_CK.sum(1)
        for s, v, dlogits_CU, peak_C in self.tiles:
            dlogits_CU.mul_((peak_C - logz_C[s]).exp_().mul_(-dlogz_C[s])[:, None])
            place_CK, is_here_CK = tile_ops.places(self.ids_CK[s] - v.start, v.stop - v.start)
            dlogits_CU.scatter_add_(1, place_CK, dlogp_CK[s].where(is_here_CK, 0))
            if self.head.inv_temperature != 1:
                dlogits_CU.mul_(self.head.inv_temperature)
            dlogits_CU = dlogits_CU.to(self.head.weight_VD.dtype)
            add_product(dhidden_CD[s], dlogits_CU, self.head.weight_VD[v])
            add_product(dweight_VD[v], dlogits_CU.t(), self.head.hidden_ND[s])


class _FusedChunk:
    """A chunk on a GPU: its logits as the product wrote them, over which their gradient goes."""

    def __init__(self, head: Head, ids_CK: torch.Tensor):
        self.head, self.ids_CK = head, ids_CK
        self.products: list[Product] = []
        self.max_C, stats = head.statistics(ids_CK, with_entropy=True, kept=self.products)
        self.sum_C, self.found_CK = stats[0], stats[2:].t()
        self.weighted_C = stats[1] - self.max_C * self.sum_C

    def add_gradients(
        self,
        logz_C: torch.Tensor,
        dlogp_CK: torch.Tensor,
        dhidden_CD: torch.Tensor,
        dweight_VD: torch.Tensor,
    ) -> None:
        """Do as `_Chunk.add_gradients` does."""
        self.head.add_gradients(
            self.ids_CK, logz_C, dlogp_CK, None, dhidden_CD, dweight_VD, self.products
        )


class _LinearLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, hidden_ND, weight_VD, ids_NK, inv_temperature, chunk, tile, token_loss, topk_NK
    ):
        on, tokens = hidden_ND.device, len(ids_NK)
        logp_NK = torch.empty(ids_NK.shape, device=on)
        entropy_N = torch.empty(tokens, device=on)
        loss = torch.zeros((), device=on)
        dhidden_ND = torch.zeros_like(hidden_ND, dtype=torch.float32)
        dweight_VD = torch.zeros_like(weight_VD, dtype=torch.float32)
        is_fused = tile_ops.is_fused(weight_VD)
        if not is_fused:
            workspace = torch.empty(min(chunk, tokens) * weight_VD.shape[0], device=on)
        for start in range(0, tokens, chunk):
            s = slice(start, min(start + chunk, tokens))
            head = Head(hidden_ND[s], weight_VD, inv_temperature, tile)
            part: _Chunk | _FusedChunk
            if is_fused:
                part = _FusedChunk(head, ids_NK[s])
            else:
                part = _Chunk(head, ids_NK[s], workspace)
            log_sum_C = part.sum_C.log()
            logz_C = part.max_C + log_sum_C
            logp_NK[s] = part.found_CK - logz_C[:, None]
            entropy_N[s] = log_sum_C - part.weighted_C / part.sum_C
            value, dlogp_CK = _differentiate(token_loss, logp_NK[s], entropy_N[s], topk_NK, s)
            loss += value
            part.add_gradients(logz_C, dlogp_CK, dhidden_ND[s], dweight_VD)
            del part  # its logits, before the next ones
        ctx.save_for_backward(dhidden_ND, dweight_VD)
        ctx.dtypes = hidden_ND.dtype, weight_VD.dtype
        topk_logp_NK = None if topk_NK is None else logp_NK[:, 1:].clone()
        values = logp_NK[:, 0].clone(), entropy_N, topk_logp_NK
        ctx.mark_non_differentiable(*(value for value in values if value is not None))
        return loss, *values

    @staticmethod
    def backward(ctx, dloss, *_):
        # In place: another fp32 copy of the head's gradient would be the step's largest tensor.
        gradients = zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        return *(gradient.mul_(dloss).to(dtype) for gradient, dtype in gradients), *[None] * 6


def _differentiate(
    token_loss: TokenLoss,
    logp_CK: torch.Tensor,
    entropy_C: torch.Tensor,
    topk_NK: torch.Tensor | None,
    s: slice,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a chunk's loss, and its gradient by the log-probs `[C, K]`."""
    with torch.enable_grad():
        leaf_CK = logp_CK.detach().requires_grad_()
        dense = (None, None) if topk_NK is None else (leaf_CK[:, 1:], topk_NK[s])
        value = token_loss(LogProbs(leaf_CK[:, 0], entropy_C, *dense), s)
        (gradient_CK,) = torch.autograd.grad(value, leaf_CK)
    return value.detach(), gradient_CK
