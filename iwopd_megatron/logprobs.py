"""LM head: hidden states -> token log-probs and entropy, vocab-parallel, without full logits.

logp_t = z_t[y_t] - logsumexp(z_t), z_t = W h_t / temperature. Logits live one tile at a time, with
a running maximum and sum over the tiles of a row, and are recomputed in the backward pass.
Shapes: N tokens, D hidden, V vocabulary shard, K scored ids, C tokens and U entries of a tile.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.distributed as dist

from iwopd_megatron import device
from iwopd_megatron.topk import RunningTopK

device.install()

from megatron.core.tensor_parallel import (  # noqa: E402
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)

# A CPU tile stays in the cache; on a GPU few large kernels are faster.
CPU_TILE, GPU_TILE = (128, 2048), (2048, 2**20)


class LogProbs(NamedTuple):
    """Per-token results, fp32, in nats, all differentiable."""

    logp: torch.Tensor  # [N]
    entropy: torch.Tensor | None  # [N]
    topk_logp: torch.Tensor | None = None  # [N, K]
    topk_ids: torch.Tensor | None = None  # [N, K] int64, of topk_logp; likeliest first if found


def linear_logprobs(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    *,
    tp_group: dist.ProcessGroup | None = None,
    sequence_parallel: bool = False,
    rows: torch.Tensor | None = None,
    temperature: float = 1.0,
    with_entropy: bool = True,
    topk_ids: torch.Tensor | None = None,
    topk: int = 0,
    chunk_tokens: int | None = None,
    chunk_vocab: int | None = None,
) -> LogProbs:
    """Log-probs of `targets`, and entropies, under the head `weight`.

    hidden: `[N, D]`, or this rank's `[N / tp, D]` when `sequence_parallel`; weight: `[V, D]`, this
    rank's rows of the vocabulary; targets: int64, one per kept row; rows: int64 indices of the
    tokens some loss reads (default all); topk_ids: int64 `[N, K]`, more ids to score (a teacher's
    top K); topk: find the K likeliest ids of the whole vocabulary and their log-probs (those
    without gradient). Matrix products run in the weight's dtype, everything else in fp32. Over tp:
    two all-reduces forward ([N] max, [3 + K, N] sum), for topk an all-gather of [N, 2 topk], and
    one collective backward, however many tiles of `chunk_tokens` x `chunk_vocab` logits there are.
    """
    if topk and topk_ids is not None:
        raise ValueError("score given topk_ids or topk, not both.")
    if sequence_parallel:
        hidden = gather_from_sequence_parallel_region(hidden, group=tp_group)
    elif tp_group is not None and tp_group.size() > 1:
        hidden = copy_to_tensor_model_parallel_region(hidden, group=tp_group)
    if rows is not None:
        hidden = hidden.index_select(0, rows)
    default = GPU_TILE if device.has_gpu() else CPU_TILE
    tile = chunk_tokens or default[0], chunk_vocab or default[1]
    hidden = hidden.to(weight.dtype)
    best = RunningTopK(len(targets), topk, targets.device) if topk else None
    logp, entropy, topk_logp = _LinearLogProbs.apply(
        hidden, weight, targets, topk_ids, 1 / temperature, tp_group, tile, with_entropy, best
    )
    return LogProbs(logp, entropy, topk_logp, best.id_NK if best else topk_ids)


def _tiles(tokens: int, vocab: int, tile: tuple[int, int]) -> Iterator[tuple[slice, slice]]:
    """All (token, vocabulary) tiles; the vocabulary outermost, so that its weights stay cached."""
    for v in range(0, vocab, tile[1]):
        for c in range(0, tokens, tile[0]):
            yield slice(c, c + tile[0]), slice(v, min(v + tile[1], vocab))


def _places(ids_CK: torch.Tensor, vocab: slice) -> tuple[torch.Tensor, torch.Tensor]:
    """Columns of these ids in a tile, 0 where they lie outside it; and which lie inside."""
    is_here_CK = (ids_CK >= vocab.start) & (ids_CK < vocab.stop)
    return (ids_CK - vocab.start).where(is_here_CK, 0), is_here_CK


def _logits(hidden_ND, weight_VD, tokens, vocab, inv_temperature) -> torch.Tensor:
    logits_CU = (hidden_ND[tokens] @ weight_VD[vocab].t()).float()
    return logits_CU if inv_temperature == 1 else logits_CU.mul_(inv_temperature)


class _LinearLogProbs(torch.autograd.Function):
    """Its hidden gradient covers this rank's vocabulary only; the caller's region op sums it."""

    @staticmethod
    def forward(
        ctx, hidden_ND, weight_VD, target_N, topk_NK, inv_temperature, group, tile, with_entropy,
        best,
    ):  # fmt: skip
        parallel = group is not None and group.size() > 1
        start = group.rank() * weight_VD.shape[0] if parallel else 0
        # Ids to score, the target first; outside [0, V) where another rank owns them.
        ids_NK = (
            target_N[:, None] if topk_NK is None else torch.cat([target_N[:, None], topk_NK], 1)
        )
        ids_NK = ids_NK - start
        stats = hidden_ND.new_zeros(2 + ids_NK.shape[1], len(target_N), dtype=torch.float32)
        sum_N, weighted_N, found_KN = stats[0], stats[1], stats[2:]  # sums of exp, of exp * logit
        max_N = torch.full_like(sum_N, -torch.inf)
        for s, v in _tiles(len(target_N), weight_VD.shape[0], tile):
            logits_CU = _logits(hidden_ND, weight_VD, s, v, inv_temperature)
            place_CK, is_here_CK = _places(ids_NK[s], v)
            found_KN[:, s] += logits_CU.gather(1, place_CK).where(is_here_CK, 0).t()
            if best is not None:
                best.add(logits_CU, s, start + v.start)
            new_max_C = torch.maximum(max_N[s], logits_CU.amax(-1))
            rescale_C = (max_N[s] - new_max_C).exp_()
            max_N[s] = new_max_C
            if with_entropy:
                exp_CU = (logits_CU - new_max_C[:, None]).exp_()
                tile_C = torch.linalg.vecdot(exp_CU, logits_CU)
                weighted_N[s] = weighted_N[s] * rescale_C + tile_C
            else:
                exp_CU = logits_CU.sub_(new_max_C[:, None]).exp_()
            sum_N[s] = sum_N[s] * rescale_C + exp_CU.sum(-1)
        if parallel:
            own_max_N = max_N.clone()
            dist.all_reduce(max_N, dist.ReduceOp.MAX, group=group)
            stats[:2] *= (own_max_N - max_N).exp_()
            dist.all_reduce(stats, group=group)
            if best is not None:
                best.merge(group)
        logz_N = max_N + sum_N.log()
        mean_logit_N = weighted_N / sum_N
        ctx.save_for_backward(hidden_ND, weight_VD, ids_NK, logz_N, mean_logit_N)
        ctx.inv_temperature, ctx.tile = inv_temperature, tile
        ctx.set_materialize_grads(False)
        logp_KN = found_KN - logz_N
        entropy_N = logz_N - mean_logit_N if with_entropy else None
        topk_logp_NK = None if topk_NK is None else logp_KN[1:].t().clone()
        if best is not None:
            topk_logp_NK = best.value_NK - logz_N[:, None]
            ctx.mark_non_differentiable(topk_logp_NK)
        return logp_KN[0].clone(), entropy_N, topk_logp_NK

    @staticmethod
    def backward(ctx, dlogp_N, dentropy_N, dtopk_NK):
        hidden_ND, weight_VD, ids_NK, logz_N, mean_logit_N = ctx.saved_tensors
        dids_NK = torch.zeros_like(ids_NK, dtype=torch.float32)
        if dlogp_N is not None:
            dids_NK[:, 0] = dlogp_N
        if dtopk_NK is not None:
            dids_NK[:, 1:] = dtopk_NK
        dlogz_N = dids_NK.sum(1)  # every scored log-prob subtracts the normaliser once
        dhidden_ND = torch.zeros_like(hidden_ND, dtype=torch.float32)
        dweight_VD = torch.zeros_like(weight_VD, dtype=torch.float32)
        for s, v in _tiles(len(logz_N), weight_VD.shape[0], ctx.tile):
            logits_CU = _logits(hidden_ND, weight_VD, s, v, ctx.inv_temperature)
            if dentropy_N is None:
                dlogits_CU = logits_CU.sub_(logz_N[s, None]).exp_().mul_(-dlogz_N[s, None])
            else:
                prob_CU = (logits_CU - logz_N[s, None]).exp_()
                scale_CU = logits_CU.sub_(mean_logit_N[s, None]).mul_(dentropy_N[s, None])
                dlogits_CU = prob_CU.mul_(scale_CU.add_(dlogz_N[s, None])).neg_()
            place_CK, is_here_CK = _places(ids_NK[s], v)
            dlogits_CU.scatter_add_(1, place_CK, dids_NK[s].where(is_here_CK, 0))
            if ctx.inv_temperature != 1:
                dlogits_CU.mul_(ctx.inv_temperature)
            dlogits_CU = dlogits_CU.to(weight_VD.dtype)
            _add_product(dhidden_ND[s], dlogits_CU, weight_VD[v])
            _add_product(dweight_VD[v], dlogits_CU.t(), hidden_ND[s])
        return dhidden_ND.to(hidden_ND.dtype), dweight_VD.to(weight_VD.dtype), *[None] * 7


def _add_product(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """total += a @ b, with an fp32 total whatever the product's dtype."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    else:
        total += a @ b
