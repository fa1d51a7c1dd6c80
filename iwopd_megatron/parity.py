"""Compare a Megatron layout with Hugging Face, on every rank.

Compared are logits, loss, every parameter's gradient and its optimiser step, under the project's
own IW-OPD loss with made-up teacher scores. The reference is computed once in the parent; each rank
compares its own shard against it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from iwopd_megatron.actor import Schedule
from iwopd_megatron.config import Layout, Loss, Train, read_hf_config
from iwopd_megatron.hf_io import HfTensors, load_shards, named_views
from iwopd_megatron.logprobs import gather_from_sequence_parallel_region
from iwopd_megatron.loss import token_denominator
from iwopd_megatron.mapping import entries
from iwopd_megatron.metrics import reduce_sums
from iwopd_megatron.model import HiddenStateModel, build_model, wrap_precision
from iwopd_megatron.objective import PolicyObjective
from iwopd_megatron.optimizer import build_optimizer, wrap_data_parallel
from iwopd_megatron.parallel import Parallel, initialise
from iwopd_megatron.trajectory import MicroBatch, Trajectory, pack
from iwopd_megatron.weighting import token_weights

TOLERANCE = {"logits": 5e-6, "grads": 1e-6, "loss": 1e-6, "weights": 1e-5}  # fp32, absolute
# Trained models round worse than that: this many times Hugging Face's own error is allowed too.
NOISE_FACTOR = 2.0
# Adam's first step is lr * g / (|g| + eps): eps must exceed float noise of a gradient near zero.
TRAIN = Train(lr=1e-3, rounds=10, eps=1e-5)
LOSS = Loss()


@dataclass
class Reference:
    """What Hugging Face computes in fp32 on one process.

    `noise` is Hugging Face's own rounding error: fp32 against fp64 (largest difference), or bf16
    against fp32 (mean difference).
    """

    hf: dict[str, Any]
    samples: list[Trajectory]
    logits: list[torch.Tensor]  # per sample [inputs, V]
    loss: float
    grad_norm: float
    grads: dict[str, torch.Tensor]
    weights: dict[str, torch.Tensor]  # after one clipped AdamW step
    noise: dict[str, float]  # of "logits" and "grads"


def make_samples(
    vocab: int, lengths: list[int], pad_id: int | None = None, seed: int = 0
) -> list[Trajectory]:
    """Random prompts (a quarter of each length), responses, and engine and teacher scores.

    `pad_id` never occurs: transformers withholds the gradient of its embedding, Megatron does not.
    """
    generator = torch.Generator().manual_seed(seed)
    samples = []
    for index, length in enumerate(lengths):
        ids = torch.randint(0, vocab - 1, (length + 1,), generator=generator)
        ids += ids >= (vocab - 1 if pad_id is None else pad_id)
        ids = ids.tolist()
        prompt = max(1, length // 4)
        logp = -6 * torch.rand(2, length + 1 - prompt, generator=generator)
        scores = logp[0].tolist(), logp[1].tolist()
        samples.append(Trajectory(index, ids[:prompt], ids[prompt:], *scores))
    return samples


def reference(folder: Path, samples: list[Trajectory], bf16: bool = False) -> Reference:
    """Run transformers on the folder, one sample at a time, with the plain padded formulas."""
    model = hf_model(folder, torch.float32)
    logits, loss = _hf_backward(model, samples)
    grads = {name: grad.clone() for name, grad in named_views(model, gradients=True).items()}
    other = hf_model(folder, torch.bfloat16 if bf16 else torch.float64)
    other_logits, _ = _hf_backward(other, samples)
    other_grads = named_views(other, gradients=True)
    error = _mean_error if bf16 else _max_error
    noise = {
        "logits": error(list(zip(other_logits, logits, strict=True))),
        "grads": error([(other_grads[name], grad) for name, grad in grads.items()]),
    }
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=TRAIN.lr,
        betas=TRAIN.betas,
        eps=TRAIN.eps,
        weight_decay=TRAIN.weight_decay,
    )
    grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), TRAIN.clip_grad).item()
    optimizer.step()
    weights = {name: weight.clone() for name, weight in named_views(model).items()}
    hf = read_hf_config(folder)
    return Reference(hf, samples, logits, loss.item(), grad_norm, grads, weights, noise)


def hf_model(
    folder: Path, dtype: torch.dtype, attention: str = "eager", experts: str = "eager"
) -> torch.nn.Module:
    """transformers' own model of a folder, with its plain implementations by default."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation=attention)
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation(experts)
    return model


def _hf_backward(
    model: torch.nn.Module, samples: list[Trajectory]
) -> tuple[list[torch.Tensor], torch.Tensor]:
    tokens = sum(len(s.response_ids) for s in samples)
    logits, total = [], torch.zeros(())
    for s in samples:
        ids = torch.tensor([s.prompt_ids + s.response_ids])
        out = model(ids[:, :-1], use_cache=False).logits[0]
        out = out.to(torch.promote_types(out.dtype, torch.float32))
        logits.append(out.detach())
        response = ids[0, len(s.prompt_ids) :]
        logp = out[len(s.prompt_ids) - 1 :].log_softmax(-1).gather(-1, response[:, None])[:, 0]
        gap = torch.tensor(s.teacher_logp) - logp.detach()
        rule = LOSS.weighting
        weight = token_weights(
            gap[None], torch.ones(1, len(gap), dtype=torch.bool), rule=rule.rule, gamma=rule.gamma
        )[0]
        correction = (logp.detach() - torch.tensor(s.rollout_logp)).exp().clamp(max=LOSS.tis_cap)
        denominator = token_denominator(LOSS.aggregation, len(gap), len(samples), tokens)
        # In one step the ratio is 1, the clip inert: the gradient is that of weight * gap * logp.
        objective = (logp - logp.detach()).exp() * weight * gap * correction / denominator
        total = total - objective.sum()
    total.backward()
    return logits, total.detach()


def _mean_error(pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> float:
    """Mean absolute difference over all elements of all pairs."""
    total = sum((a.double() - b.double()).abs().sum().item() for a, b in pairs)
    return total / max(1, sum(a.numel() for a, _ in pairs))


def _max_error(pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> float:
    """Largest absolute difference; NaN counts as infinite, so that no comparison passes over it."""
    errors = [(a.double() - b.double()).abs().max().item() for a, b in pairs]
    return max((e if e == e else float("inf") for e in errors), default=0.0)


def compare(
    folder: Path,
    ref: Reference,
    layout: Layout,
    budget: int,
    dtype: str = "fp32",
    recompute: str = "none",
) -> dict[str, float]:
    """Differences from the reference, worst of all ranks (fp32 max, bf16 mean). Collective."""
    parallel = initialise(layout)
    batches, length = pack(ref.samples, parallel, budget, LOSS.aggregation)
    result: dict[str, float] = {}
    for distributed in (False, True):
        train = TRAIN.model_copy(update={"distributed_optimizer": distributed})
        chunks = build_model(ref.hf, parallel, dtype, recompute)
        load_shards(chunks, HfTensors(folder), ref.hf, parallel)
        wrapped = wrap_data_parallel(wrap_precision(chunks), train)
        optimizer = build_optimizer(wrapped, train)
        schedule = Schedule(wrapped, parallel)
        if (
            not distributed
        ):  # gradients are whole on every rank only without the distributed optimizer
            result["logits"] = _logit_error(schedule, ref, batches, length, dtype)
        loss = _backward(schedule, optimizer, batches, length)
        if not distributed:
            result["loss"] = abs(loss - ref.loss)
            result["grads"] = _shard_error(chunks, ref.grads, ref.hf, parallel, dtype, "main_grad")
        result["grad_norm"] = float(optimizer.step()[1])
        if dtype == "fp32":
            error = _shard_error(chunks, ref.weights, ref.hf, parallel, dtype, "data")
            result["weights"] = max(error, result.get("weights", 0.0))
    return {**result, "ranks": dist.get_world_size()}


def _backward(schedule: Schedule, optimizer, batches: list[MicroBatch], length: int) -> float:
    """Gradients of the IW-OPD loss; returns the loss over all ranks."""
    for chunk in schedule.chunks:
        chunk.zero_grad_buffer()
    optimizer.zero_grad()
    objective = PolicyObjective(LOSS, schedule.parallel.cp.group)

    def on_output(hidden, model, batch):
        return objective(schedule.logprobs(hidden, model, batch), batch)

    kept = schedule.run(batches, length, on_output)
    return reduce_sums(kept, schedule.parallel, {"loss": 1})["loss"].item()


def _logit_error(
    schedule: Schedule, ref: Reference, batches: list[MicroBatch], length: int, dtype: str
) -> float:
    """This rank's vocabulary columns of its own tokens against the reference's."""
    tp = schedule.parallel.tp
    columns = slice(
        tp.rank * ref.hf["vocab_size"] // tp.size, (tp.rank + 1) * ref.hf["vocab_size"] // tp.size
    )

    def on_output(hidden, model, batch):
        if tp.size > 1:
            hidden = gather_from_sequence_parallel_region(hidden, group=tp.group)
        weight = model.head_weight()
        logits = (hidden[batch.rows, 0].to(weight.dtype) @ weight.t()).float().cpu()
        expected = [
            ref.logits[owner][len(ref.samples[owner].prompt_ids) - 1 + t, columns]
            for owner, t in zip(batch.owner.tolist(), batch.offset.tolist(), strict=True)
        ]
        pairs = [(logits, torch.stack(expected))] if expected else []
        return torch.zeros((), device=hidden.device), pairs

    kept = schedule.run(batches, length, on_output, forward_only=True)
    return _worst([pair for pairs in kept for pair in pairs], dtype)


def _shard_error(
    chunks: list[HiddenStateModel],
    whole: dict[str, torch.Tensor],
    hf: dict,
    parallel: Parallel,
    dtype: str,
    field: str,
) -> float:
    """`field` of all this rank's parameters against its own cut of the reference's tensors."""
    pairs = []
    for chunk in chunks:
        for entry in entries(chunk, hf):
            axis = parallel.etp if entry.is_expert else parallel.tp
            expected = entry.cut.shard(
                [whole[name] for name in entry.hf_names], axis.rank, axis.size, hf
            )
            pairs.append((getattr(entry.parameter, field).cpu(), expected))
    return _worst(pairs, dtype)


def _worst(pairs: list[tuple[torch.Tensor, torch.Tensor]], dtype: str) -> float:
    """Over all ranks: the largest difference (fp32), or the largest rank's mean (bf16)."""
    errors: list[float] = [0.0] * dist.get_world_size()
    dist.all_gather_object(errors, _mean_error(pairs) if dtype == "bf16" else _max_error(pairs))
    return max(errors)


def failures(result: dict[str, float], ref: Reference, dtype: str) -> list[str]:
    """One sentence per figure past its tolerance; empty when the layout agrees."""
    limits = {key: NOISE_FACTOR * noise for key, noise in ref.noise.items()}
    if dtype == "fp32":
        limits = {key: max(limit, limits.get(key, 0.0)) for key, limit in TOLERANCE.items()}
    return [
        f"{key} differ by {result[key]:.3g}, allowed {limit:.3g}"
        for key, limit in limits.items()
        if not result[key] <= limit
    ]
