"""What Hugging Face computes: the yardstick of `parity`, with transformers' plain implementations.

One process, one sample at a time, the padded formulas of the loss; and transformers' own rounding
error, from the same computation in another precision.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from iwopd_megatron.batch.trajectory import Trajectory
from iwopd_megatron.config.loss import Loss
from iwopd_megatron.config.recipe import Train
from iwopd_megatron.hf.config import HfConfig, read_hf_config
from iwopd_megatron.loss.policy import token_denominator
from iwopd_megatron.loss.weighting import token_weights
from iwopd_megatron.weights.hf_reader import HfTensors
from iwopd_megatron.weights.transformers_views import named_gradients, named_views

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Adam's first step is lr * g / (|g| + eps): eps must exceed float noise of a gradient near zero.
TRAIN = Train(lr=1e-3, rounds=10, eps=1e-5)
LOSS = Loss()


@dataclass
class Reference:
    """What Hugging Face computes in fp32 on one process.

    `noise` is Hugging Face's own rounding error, fp32 against fp64 or bf16 against fp32. Logits and
    gradients: the largest difference, in bf16 the mean. Loss and gradient norm are single numbers
    whose errors may cancel: the sum over the tokens' differences, and the norm of the gradients'
    difference over their norm.
    """

    hf: HfConfig
    samples: list[Trajectory]
    logits: list[torch.Tensor]  # per sample [inputs, V]
    loss: float
    grad_norm: float
    grads: dict[str, torch.Tensor]
    weights: dict[str, torch.Tensor]  # after one clipped AdamW step
    noise: dict[str, float]  # of "logits", "grads", "loss" and "grad_norm_error"


def make_samples(
    vocab: int, lengths: list[int], pad_id: int | None = None, seed: int = 0
) -> list[Trajectory]:
    """Make random prompts (a quarter of each length), responses, engine and teacher scores.

    `pad_id` occurs in every prompt and in every response.
    """
    generator = torch.Generator().manual_seed(seed)
    samples = []
    for index, length in enumerate(lengths):
        ids = torch.randint(0, vocab, (length + 1,), generator=generator).tolist()
        prompt = max(1, length // 4)
        if pad_id is not None:
            ids[prompt // 2] = ids[(prompt + length) // 2] = pad_id
        logp = -6 * torch.rand(2, length + 1 - prompt, generator=generator)
        scores = logp[0].tolist(), logp[1].tolist()
        samples.append(Trajectory(index, ids[:prompt], ids[prompt:], *scores))
    return samples


def compute_reference(folder: Path, samples: list[Trajectory], bf16: bool = False) -> Reference:
    """Run transformers on the folder, one sample at a time, with the plain padded formulas.

    Two precisions: fp32, and fp64 (or bf16) for its own rounding error.
    """
    model = hf_model(folder, torch.float32)
    logits, losses = _hf_backward(model, samples)
    grads = {name: grad.clone() for name, grad in named_gradients(model).items()}
    other = hf_model(folder, torch.bfloat16 if bf16 else torch.float64)
    other_logits, other_losses = _hf_backward(other, samples)
    other_grads = named_gradients(other)
    error = mean_error if bf16 else max_error
    pairs = [(other_grads[name], grad) for name, grad in grads.items()]
    noise = {
        "logits": error(list(zip(other_logits, logits, strict=True))),
        "grads": error(pairs),
        "loss": (other_losses.double() - losses.double()).abs().sum().item(),
        "grad_norm_error": _norm([a.double() - b.double() for a, b in pairs])
        / _norm(grads.values()),
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
    loss = losses.double().sum().item()
    return Reference(hf, samples, logits, loss, grad_norm, grads, weights, noise)


def hf_model(
    folder: Path, dtype: torch.dtype, attention: str = "eager", experts: str = "eager"
) -> PreTrainedModel:
    """Return transformers' own model of a folder, with its plain implementations by default.

    Scaled weights are given to it multiplied: its own readers of them need other packages.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    options = {"dtype": dtype, "attn_implementation": attention}
    model: PreTrainedModel
    if read_hf_config(folder).quantization is None:
        model = AutoModelForCausalLM.from_pretrained(folder, **options)
    else:
        model = _with_plain_weights(folder, options)
    if read_hf_config(folder).num_experts and hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation(experts)
    return model


def _with_plain_weights(folder: Path, options: dict[str, Any]) -> PreTrainedModel:
    from transformers import AutoConfig, AutoModelForCausalLM

    config, tensors = AutoConfig.from_pretrained(folder), HfTensors(folder)
    del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, **options).eval()
    for name, view in named_views(model).items():
        view.copy_(tensors[name][:])
    return model


def _hf_backward(
    model: PreTrainedModel, samples: list[Trajectory]
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Return every sample's logits, and what each response token adds to the loss."""
    tokens = sum(len(s.response_ids) for s in samples)
    logits, losses = [], []
    for s in samples:
        ids = torch.tensor([s.prompt_ids + s.response_ids])
        out = model(ids[:, :-1], use_cache=False).logits[0]
        out = out.to(torch.promote_types(out.dtype, torch.float32))
        logits.append(out.detach())
        response = ids[0, len(s.prompt_ids) :]
        logp = out[len(s.prompt_ids) - 1 :].log_softmax(-1).gather(-1, response[:, None])[:, 0]
        gap = torch.tensor(s.teacher_logp) - logp.detach()
        everywhere = torch.ones(1, len(gap), dtype=torch.bool)
        weight = token_weights(gap[None], everywhere, rule=LOSS.weighting)[0]
        correction = (logp.detach() - torch.tensor(s.rollout_logp)).exp().clamp(max=LOSS.tis_cap)
        denominator = token_denominator(LOSS.aggregation, len(gap), len(samples), tokens)
        # In one step the ratio is 1, the clip inert: the gradient is that of weight * gap * logp.
        objective = (logp - logp.detach()).exp() * weight * gap * correction / denominator
        losses.append(-objective)
    loss_N = torch.cat(losses)
    loss_N.sum().backward()
    return logits, loss_N.detach()


def _norm(tensors: Iterable[torch.Tensor]) -> float:
    return math.sqrt(sum(tensor.double().square().sum().item() for tensor in tensors))


def mean_error(pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> float:
    """Return the mean absolute difference over all elements of all pairs."""
    total = sum((a.double() - b.double()).abs().sum().item() for a, b in pairs)
    return total / max(1, sum(a.numel() for a, _ in pairs))


def max_error(pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> float:
    """Return the largest absolute difference; NaN counts as infinite, so that it always fails."""
    errors = [(a.double() - b.double()).abs().max().item() for a, b in pairs]
    return max((e if e == e else float("inf") for e in errors), default=0.0)
