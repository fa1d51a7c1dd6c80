"""A round's optimiser steps, and the metrics line they make. Collective."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch

from iwopd_megatron.batch import gates
from iwopd_megatron.batch.metrics import (
    bin_tokens,
    reduce_sums,
    router_means,
    sums_of,
    token_means,
)
from iwopd_megatron.batch.objective import Objective
from iwopd_megatron.batch.packing import MicroBatch
from iwopd_megatron.batch.trajectory import Trajectory
from iwopd_megatron.config.recipe import Recipe
from iwopd_megatron.train.student import StudentModel


@dataclass(frozen=True)
class PackedMinibatch:
    """This rank's micro-batches of one optimiser step, and the loss they are trained on."""

    batches: list[MicroBatch]
    length: int  # tokens of the longest before the context-parallel cut, as `Packer` returns it
    objective: Objective


def train_round(
    recipe: Recipe,
    student: StudentModel,
    samples: list[Trajectory],
    packed: Iterable[PackedMinibatch],
    on_skip: Callable[[str], None],
) -> dict[str, Any]:
    """Take one optimiser step for each of `packed` and return the means over all of them.

    samples: all of the round; packed: every epoch's, in order, drawn as steps are taken; on_skip:
    called with the reason of a step left out. GateError where engine and trainer disagree.
    """
    kind = recipe.loss.objective if recipe.is_distilling else None
    total = {name: torch.zeros(n).double() for name, n in sums_of(kind).items()}
    norms: list[float] = []
    for step in packed:
        kept = student.accumulate(step.batches, step.length, step.objective)
        sums = reduce_sums(kept, student.parallel, sums_of(kind), student.expert_tokens)
        if kind is not None:
            gates.drift(token_means(sums, kind)["drift"], recipe.gates.max_drift)
        norms.append(student.step())
        if not math.isfinite(norms[-1]):
            on_skip(f"the gradient norm is {norms[-1]}")
        total = {name: total[name] + sums[name] if name in total else sums[name] for name in sums}
    # every epoch counted the same tokens
    total |= {name: total[name] / recipe.train.epochs for name in total if name != "loss"}
    line = {
        "loss": total["loss"].item() / max(len(norms), 1),
        "responses": sum(sample.loss_tokens > 0 for sample in samples),
        "response_tokens": sum(len(sample.response_ids) for sample in samples),
        "loss_tokens": round(total["tokens"].item()),
    }
    if kind is not None:
        line |= token_means(total, kind)
        line["bin_tokens"] = bin_tokens(recipe.rollout.max_response_tokens)
    counted = student.expert_tokens
    if counted is not None and "expert_tokens" in total:
        dense = student.hf.first_k_dense_replace  # layers that send no tokens to experts
        line |= router_means(total["expert_tokens"].view_as(counted)[dense:])
    line |= {"grad_norm": sum(norms) / max(len(norms), 1), "lr": student.lr}
    student.end_round()
    return line
