"""A round's optimiser steps, and the metrics line they make. Collective."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from iwopd_megatron.batch import gates
from iwopd_megatron.batch.metrics import reduce_sums, router_means, sums_of, token_means
from iwopd_megatron.batch.minibatch import Minibatch
from iwopd_megatron.batch.packing import Packer
from iwopd_megatron.config.recipe import Recipe
from iwopd_megatron.train.student import Student


def train_round(
    recipe: Recipe,
    student: Student,
    packer: Packer,
    minibatches: list[Minibatch],
    on_skip: Callable[[str], None],
) -> dict[str, Any]:
    """One step a minibatch and epoch; means over all of them. `on_skip` hears of steps left out."""
    kind = recipe.loss.objective if recipe.is_distilling else None
    total = {name: torch.zeros(n).double() for name, n in sums_of(kind).items()}
    norms = []
    for _ in range(recipe.train.epochs):
        for minibatch in minibatches:
            if not any(sample.loss_tokens for sample in minibatch.samples):
                on_skip("every response token is masked")
                continue
            batches, length = minibatch.pack(packer, recipe.loss.aggregation)
            kept = student.accumulate(batches, length, minibatch.objective)
            sums = reduce_sums(kept, packer.parallel, sums_of(kind), student.expert_tokens)
            if kind is not None:
                gates.drift(token_means(sums, kind)["drift"], recipe.gates.max_drift)
            norms.append(student.step())
            if not math.isfinite(norms[-1]):
                on_skip(f"the gradient norm is {norms[-1]}")
            total = {name: total.get(name, 0) + sums[name] for name in sums}
    samples = [sample for minibatch in minibatches for sample in minibatch.samples]
    # every epoch counted the same tokens
    total |= {name: total[name] / recipe.train.epochs for name in total if name != "loss"}
    line = {
        "loss": total["loss"].item() / max(len(norms), 1),
        "responses": sum(sample.loss_tokens > 0 for sample in samples),
        "response_tokens": sum(len(sample.response_ids) for sample in samples),
        "loss_tokens": round(total["tokens"].item()),
    }
    if kind is not None:
        line |= minibatches[0].objective.token_metrics(total)
    if "expert_tokens" in total:
        line |= router_means(total["expert_tokens"].view_as(student.expert_tokens))
    line |= {"grad_norm": sum(norms) / max(len(norms), 1), "lr": student.lr}
    student.end_round()
    return line
