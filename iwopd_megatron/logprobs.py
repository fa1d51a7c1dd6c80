"""LM head: hidden states -> token log-probs and entropy, vocab-parallel, chunked, no full logits.

logp_t = z_t[y_t] - logsumexp(z_t),  z_t = W h_t / temperature.  Logits live one chunk at a time and
are recomputed in the backward pass. Shapes: N tokens, D hidden, V vocabulary shard, C chunk.
"""

from typing import NamedTuple

import torch
import torch.distributed as dist

from iwopd_megatron import device

device.install()

from megatron.core.tensor_parallel import (  # noqa: E402
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)


class LogProbs(NamedTuple):
    """Per-token results, fp32 `[N]`, in nats."""

    logp: torch.Tensor
    entropy: torch.Tensor


def linear_logprobs(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    *,
    tp_group: dist.ProcessGroup | None = None,
    sequence_parallel: bool = False,
    rows: torch.Tensor | None = None,
    temperature: float = 1.0,
    chunk_tokens: int = 2048,
) -> LogProbs:
    """Log-probs of `targets` and entropies under the head `weight`.

    hidden: `[N, D]`, or this rank's `[N / tp, D]` when `sequence_parallel`; weight: `[V, D]`, this
    rank's rows of the vocabulary; targets: int64, one per kept row; rows: int64 indices of the
    tokens some loss reads (default all). Matrix products run in the weight's dtype, everything else
    in fp32. Over tp: two all-reduces forward ([N] max, [3, N] sum) and one collective backward,
    however many chunks.
    """
    if sequence_parallel:
        hidden = gather_from_sequence_parallel_region(hidden, group=tp_group)
    elif tp_group is not None and tp_group.size() > 1:
        hidden = copy_to_tensor_model_parallel_region(hidden, group=tp_group)
    if rows is not None:
        hidden = hidden.index_select(0, rows)
    hidden = hidden.to(weight.dtype)
    return LogProbs(
        *_LinearLogProbs.apply(hidden, weight, targets, 1 / temperature, tp_group, chunk_tokens)
    )


class _LinearLogProbs(torch.autograd.Function):
    """Its hidden gradient covers this rank's vocabulary only; the caller's region op sums it."""

    @staticmethod
    def forward(ctx, hidden_ND, weight_VD, target_N, inv_temperature, group, chunk):
        parallel = group is not None and group.size() > 1
        start = group.rank() * weight_VD.shape[0] if parallel else 0
        local_N = (target_N - start).clamp(0, weight_VD.shape[0] - 1)
        owned_N = (target_N >= start) & (target_N < start + weight_VD.shape[0])
        stats = hidden_ND.new_empty(4, len(target_N), dtype=torch.float32)
        max_N, sum_N, weighted_N, target_logit_N = stats  # views: sum of exp, sum of exp * logit
        for c in range(0, len(target_N), chunk):
            s = slice(c, c + chunk)
            logits_CV = (hidden_ND[s] @ weight_VD.t()).float() * inv_temperature
            max_N[s] = logits_CV.amax(-1)
            target_logit_N[s] = logits_CV.gather(-1, local_N[s, None]).squeeze(-1) * owned_N[s]
            exp_CV = (logits_CV - max_N[s, None]).exp_()
            sum_N[s] = exp_CV.sum(-1)
            weighted_N[s] = torch.einsum("cv,cv->c", exp_CV, logits_CV)
        global_max_N = max_N.clone()
        if parallel:
            dist.all_reduce(global_max_N, dist.ReduceOp.MAX, group=group)
            stats[1:3] *= (max_N - global_max_N).exp()
            dist.all_reduce(stats[1:], group=group)
        logz_N = global_max_N + sum_N.log()
        mean_logit_N = weighted_N / sum_N
        ctx.save_for_backward(hidden_ND, weight_VD, local_N, owned_N, logz_N, mean_logit_N)
        ctx.inv_temperature, ctx.chunk = inv_temperature, chunk
        return target_logit_N - logz_N, logz_N - mean_logit_N

    @staticmethod
    def backward(ctx, dlogp_N, dentropy_N):
        hidden_ND, weight_VD, local_N, owned_N, logz_N, mean_logit_N = ctx.saved_tensors
        dhidden_ND = torch.empty_like(hidden_ND)
        dweight_VD = torch.zeros_like(weight_VD, dtype=torch.float32)
        for c in range(0, len(logz_N), ctx.chunk):
            s = slice(c, c + ctx.chunk)
            logits_CV = (hidden_ND[s] @ weight_VD.t()).float() * ctx.inv_temperature
            prob_CV = (logits_CV - logz_N[s, None]).exp_()
            scale_CV = (
                logits_CV.sub_(mean_logit_N[s, None])
                .mul_(dentropy_N[s, None])
                .add_(dlogp_N[s, None])
            )
            dlogits_CV = prob_CV.mul_(scale_CV).neg_()
            dlogits_CV.scatter_add_(-1, local_N[s, None], (dlogp_N[s] * owned_N[s])[:, None])
            dlogits_CV = dlogits_CV.mul_(ctx.inv_temperature).to(weight_VD.dtype)
            dhidden_ND[s] = dlogits_CV @ weight_VD
            dweight_VD += dlogits_CV.t() @ hidden_ND[s]
        return dhidden_ND, dweight_VD.to(weight_VD.dtype), None, None, None, None
