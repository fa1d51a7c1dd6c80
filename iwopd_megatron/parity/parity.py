"""Compare a Megatron layout with Hugging Face, on every rank.

Compared are logits, loss, every parameter's gradient and its optimiser step, under the project's
own IW-OPD loss with made-up teacher scores. The reference is computed once in the parent; each rank
compares its own shard against it.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist

from iwopd_megatron.batch.metrics import reduce_sums
from iwopd_megatron.batch.objective import DistillationObjective
from iwopd_megatron.batch.packing import Packer
from iwopd_megatron.batch.trajectory import Trajectory
from iwopd_megatron.config.models import Layout
from iwopd_megatron.hf.config import HfConfig
from iwopd_megatron.models.actor import Schedule
from iwopd_megatron.models.gpt import HiddenStateModel, build_model, wrap_precision
from iwopd_megatron.models.optimizer import build_optimizer, wrap_data_parallel
from iwopd_megatron.parity.hf_reference import LOSS, TRAIN, Reference, max_error, mean_error
from iwopd_megatron.runtime.megatron import gather_from_sequence_parallel_region
from iwopd_megatron.runtime.parallel import Parallel, gather, initialise
from iwopd_megatron.weights.hf_reader import HfTensors, load_shards
from iwopd_megatron.weights.table import mapped_parameters

# fp32, absolute; the gradient norm relative
TOLERANCE = {"logits": 5e-6, "grads": 1e-6, "loss": 1e-6, "grad_norm_error": 1e-5, "weights": 1e-5}
# Trained models round worse than that. This many times Hugging Face's own error is allowed too,
NOISE_FACTOR = 2.0
# and of gradients this share of the largest: that error is one draw, which varies tenfold.
GRADIENT_SHARE = 5e-6


def compare(
    folder: Path,
    ref: Reference,
    layout: Layout,
    budget: int,
    dtype: str = "fp32",
    recompute: str = "none",
) -> dict[str, float]:
    """Return differences from the reference, worst of all ranks (fp32 max, bf16 mean). Collective.

    With and without the distributed optimizer; the gradient norm's difference is relative.
    """
    parallel = initialise(layout)
    batches, length = Packer(parallel, budget)(ref.samples, LOSS.aggregation)
    result = {"grad_norm_error": 0.0}
    for distributed in (False, True):
        train = TRAIN.model_copy(update={"distributed_optimizer": distributed})
        chunks = build_model(ref.hf, parallel, dtype, recompute)
        load_shards(chunks, HfTensors(folder), ref.hf, parallel)
        wrapped = wrap_data_parallel(wrap_precision(chunks), train)
        optimizer = build_optimizer(wrapped, train)
        schedule = Schedule(wrapped, parallel)
        if not distributed:
            result["logits"] = _logit_error(schedule, ref, budget, dtype)
        objective = DistillationObjective(LOSS, parallel.cp.group)
        kept = schedule.accumulate(optimizer, batches, length, objective)
        if not distributed:  # with it, no rank but the owner of a slice holds the whole gradient
            loss = reduce_sums(kept, parallel, {"loss": 1})["loss"].item()
            result["loss"] = abs(loss - ref.loss)
            result["grads"] = _shard_error(chunks, ref.grads, ref.hf, parallel, dtype, "main_grad")
        result["grad_norm"] = float(optimizer.step()[1])
        error = _worst(abs(result["grad_norm"] / ref.grad_norm - 1))
        result["grad_norm_error"] = max(error, result["grad_norm_error"])
        if dtype == "fp32":
            error = _shard_error(chunks, ref.weights, ref.hf, parallel, dtype, "data")
            result["weights"] = max(error, result.get("weights", 0.0))
    return {**result, "ranks": dist.get_world_size()}


def _all_response(sample: Trajectory) -> Trajectory:
    """Return the same inputs, every one a loss row: a prompt of one token, the rest response."""
    ids = sample.prompt_ids + sample.response_ids
    return Trajectory(sample.index, ids[:1], ids[1:])


def _logit_error(schedule: Schedule, ref: Reference, budget: int, dtype: str) -> float:
    """Compare this rank's vocabulary columns of all its tokens but padding with the reference's."""
    batches, length = Packer(schedule.parallel, budget)([_all_response(s) for s in ref.samples])
    tp = schedule.parallel.tp
    columns = slice(
        tp.rank * ref.hf.vocab_size // tp.size, (tp.rank + 1) * ref.hf.vocab_size // tp.size
    )

    def on_output(hidden, model, batch):
        if tp.size > 1:
            hidden = gather_from_sequence_parallel_region(hidden, group=tp.group)
        weight = model.head_weight()
        logits = (hidden[batch.rows, 0].to(weight.dtype) @ weight.t()).float().cpu()
        expected = [
            ref.logits[owner][t, columns]
            for owner, t in zip(batch.owner.tolist(), batch.offset.tolist(), strict=True)
        ]
        pairs = [(logits, torch.stack(expected))] if expected else []
        return torch.zeros((), device=hidden.device), pairs

    kept = schedule.run(batches, length, on_output, forward_only=True)
    return _worst(_error([pair for pairs in kept for pair in pairs], dtype))


def _shard_error(
    chunks: list[HiddenStateModel],
    whole: dict[str, torch.Tensor],
    hf: HfConfig,
    parallel: Parallel,
    dtype: str,
    field: str,
) -> float:
    """Compare `field` of all this rank's parameters with its own shards of whole tensors."""
    pairs = []
    for chunk in chunks:
        for mapped in mapped_parameters(chunk, hf):
            if not mapped.is_trained and field != "data":
                continue
            axis = parallel.etp if mapped.is_expert else parallel.tp
            expected = mapped.sharding.shard(
                [whole[name] for name in mapped.hf_names], axis.rank, axis.size, hf
            )
            pairs.append((getattr(mapped.parameter, field).cpu(), expected))
    return _worst(_error(pairs, dtype))


def _error(pairs: list[tuple[torch.Tensor, torch.Tensor]], dtype: str) -> float:
    return mean_error(pairs) if dtype == "bf16" else max_error(pairs)


def _worst(error: float) -> float:
    """Return the largest error of all ranks; NaN, which max() may pass over, counts as infinite."""
    return max(gather(error if error == error else float("inf")))


def failures(result: dict[str, float], ref: Reference, dtype: str) -> list[str]:
    """Return one sentence per figure past its tolerance; none when the layout agrees."""
    limits = {key: NOISE_FACTOR * noise for key, noise in ref.noise.items()}
    if dtype == "fp32":
        largest = max(gradient.abs().max().item() for gradient in ref.grads.values())
        limits["grads"] = max(limits["grads"], GRADIENT_SHARE * largest)
        limits = {key: max(limit, limits.get(key, 0.0)) for key, limit in TOLERANCE.items()}
    return [
        f"{key} differ by {result[key]:.3g}, allowed {limit:.3g}"
        for key, limit in limits.items()
        if not result[key] <= limit
    ]
