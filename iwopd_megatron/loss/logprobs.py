"""LM head: hidden states -> token log-probs and entropy, vocab-parallel, without full logits.

logp_t = z_t[y_t] - logsumexp(z_t), z_t = W h_t / temperature. Logits live one tile at a time, with
a running maximum and sum over the tiles of a row, and are recomputed in the backward pass.
Shapes: N tokens, D hidden, V vocabulary shard, K scored ids.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist

from iwopd_megatron.loss.head import Head
from iwopd_megatron.loss.tile_ops import EntropyGradient
from iwopd_megatron.loss.topk import RunningTopK
from iwopd_megatron.runtime import device
from iwopd_megatron.runtime.megatron import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)

# A CPU tile stays in the cache, though top-K selection prefers width; on a GPU few large kernels
# are faster.
CPU_TILE, CPU_TOPK_TILE, GPU_TILE = (128, 2048), (128, 16384), (2048, 2**20)


class LogProbs(NamedTuple):
    """Per-token results of an LM head, fp32, in nats, all differentiable."""

    logp: torch.Tensor  # [N]
    entropy: torch.Tensor | None  # [N]
    topk_logp: torch.Tensor | None = None  # [N, K]
    topk_ids: torch.Tensor | None = None  # [N, K] int64, of topk_logp; likeliest first if found

    def known_entropy(self) -> torch.Tensor:
        """Return `entropy`; ValueError where it was not asked for."""
        if self.entropy is None:
            raise ValueError("these log-probs came without entropies; ask for them.")
        return self.entropy

    def known_topk(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return `topk_ids` and `topk_logp`; ValueError where no ids were scored or searched."""
        if self.topk_ids is None or self.topk_logp is None:
            raise ValueError("these log-probs are of the targets alone; ask for topk_ids or topk.")
        return self.topk_ids, self.topk_logp


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
    """Return log-probs of `targets`, and entropies, under the head `weight`.

    hidden: `[N, D]`, or this rank's `[N / tp, D]` when `sequence_parallel`; weight: `[V, D]`, this
    rank's rows of the vocabulary; targets: int64, one per kept row; rows: int64 indices of the
    tokens some loss reads (default all); topk_ids: int64 `[N, K]`, more ids to score (a teacher's
    top K); topk: find the K likeliest ids of the whole vocabulary and their log-probs (those
    without gradient). Matrix products run in the weight's dtype, everything else in fp32. Over tp:
    two all-reduces forward ([N] max, [3 + K, N] sum), for topk an all-gather of [N, 2 topk], and
    one collective backward, however many tiles of `chunk_tokens` x `chunk_vocab` logits there are.
    ValueError where both topk_ids and topk are given.
    """
    if topk and topk_ids is not None:
        raise ValueError("score given topk_ids or topk, not both.")
    if sequence_parallel:
        hidden = gather_from_sequence_parallel_region(hidden, group=tp_group)
    elif tp_group is not None and tp_group.size() > 1:
        hidden = copy_to_tensor_model_parallel_region(hidden, group=tp_group)
    if rows is not None:
        hidden = hidden.index_select(0, rows)
    default = default_tile(topk)
    tile = chunk_tokens or default[0], chunk_vocab or default[1]
    best = RunningTopK(len(targets), topk, targets.device) if topk else None
    logp, entropy, topk_logp = _LinearLogProbs.apply(
        hidden.to(weight.dtype),
        weight,
        scored_ids(targets, topk_ids),
        1 / temperature,
        tp_group,
        tile,
        with_entropy,
        best,
    )
    if best is not None:
        return LogProbs(logp, entropy, topk_logp, best.id_NK)
    return LogProbs(logp, entropy, None if topk_ids is None else topk_logp, topk_ids)


def default_tile(topk: int = 0) -> tuple[int, int]:
    """Return tokens and vocabulary entries of a tile of logits on this device."""
    if device.has_gpu_kernels():
        return GPU_TILE
    return CPU_TOPK_TILE if topk else CPU_TILE


def scored_ids(target_N: torch.Tensor, topk_NK: torch.Tensor | None) -> torch.Tensor:
    """Return the ids whose log-probs are wanted, `[N, 1 + K]`, the target first."""
    return target_N[:, None] if topk_NK is None else torch.cat([target_N[:, None], topk_NK], 1)


class _LinearLogProbs(torch.autograd.Function):
    """Log-probs whose hidden gradient is this rank's part; the caller's region op sums it."""

    @staticmethod
    def forward(
        ctx, hidden_ND, weight_VD, ids_NK, inv_temperature, group, tile, with_entropy, best
    ):
        parallel = group is not None and group.size() > 1
        start = group.rank() * weight_VD.shape[0] if parallel else 0
        ids_NK = ids_NK - start  # outside [0, V) where another rank owns them
        head = Head(hidden_ND, weight_VD, inv_temperature, tile)
        max_N, stats = head.statistics(ids_NK, with_entropy, best, start)
        if parallel:
            own_max_N = max_N.clone()
            dist.all_reduce(max_N, dist.ReduceOp.MAX, group=group)
            stats[:2] *= (own_max_N - max_N).exp_()
            dist.all_reduce(stats, group=group)
            if best is not None:
                best.merge(group)
        logz_N = max_N + stats[0].log()
        mean_logit_N = stats[1] / stats[0]
        ctx.save_for_backward(hidden_ND, weight_VD, ids_NK, logz_N, mean_logit_N)
        ctx.inv_temperature, ctx.tile = inv_temperature, tile
        ctx.set_materialize_grads(False)
        logp_KN = stats[2:] - logz_N
        entropy_N = logz_N - mean_logit_N if with_entropy else None
        topk_logp_NK = logp_KN[1:].t().clone()
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
        dhidden_ND = torch.zeros_like(hidden_ND, dtype=torch.float32)
        dweight_VD = torch.zeros_like(weight_VD, dtype=torch.float32)
        entropy = None if dentropy_N is None else EntropyGradient(dentropy_N, mean_logit_N)
        head = Head(hidden_ND, weight_VD, ctx.inv_temperature, ctx.tile)
        head.add_gradients(ids_NK, logz_N, dids_NK, entropy, dhidden_ND, dweight_VD)
        return dhidden_ND.to(hidden_ND.dtype), dweight_VD.to(weight_VD.dtype), *[None] * 6
