"""Bytes of one GPU by purpose: weights, gradients, optimiser, LM head, and an engine's KV cache.

All at the busiest rank of a role. `training`, `scoring` and `engine` put the parts together;
activations.py has the formulas of activations. Weights and optimiser are as Megatron's distributed
optimizer allocates them (its documentation, "Distributed Optimizer": 6 + 12 / dp bytes a parameter
in bf16, 18 without). tests/test_plan_measured.py holds them against Megatron's tensors.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from iwopd_megatron.config.models import Layout
from iwopd_megatron.config.stages import distinct_stages
from iwopd_megatron.plan.activations import (
    activation_bytes,
    attention_bytes,
    buffer_bytes,
    mlp_bytes,
)
from iwopd_megatron.plan.hardware import CONTEXT, FRAGMENTATION, Gpu
from iwopd_megatron.plan.model_size import ModelSize

HEAD_ROWS = 2048  # logprobs.GPU_TILE and linear_loss.GPU_CHUNK, whose modules import torch


@dataclass(frozen=True)
class Memory:
    """Bytes of one GPU by purpose; `total` is what the allocator reserves, with the context."""

    weights: float = 0
    gradients: float = 0
    optimizer: float = 0
    activations: float = 0
    head: float = 0
    communication: float = 0
    scorer: float = 0  # an embedded teacher or base student
    kv_cache: float = 0
    context: float = CONTEXT

    def items(self) -> Iterator[tuple[str, float]]:
        """Yield (purpose, bytes) of all parts that are not 0."""
        return ((name, value) for name, value in vars(self).items() if value)

    @property
    def allocated(self) -> float:
        """Bytes of tensors = all parts but the context."""
        return sum(value for _, value in self.items()) - self.context

    @property
    def total(self) -> float:
        """Bytes reserved = (allocated - KV cache) x FRAGMENTATION + KV cache + context.

        An engine takes its cache in one piece, which does not fragment.
        """
        pool = self.kv_cache
        return (self.allocated - pool) * FRAGMENTATION + pool + self.context


@dataclass(frozen=True)
class Precision:
    """Bytes per parameter of each state; the default is bf16 training.

    Published runs that bench/plan.py compares also keep bf16 gradients or half of the main weights.
    """

    weight: int = 2
    gradient: int = 4  # DDP sums gradients in fp32
    main: int = 4  # fp32 main weights; none beside fp32 weights
    moments: int = 8

    @classmethod
    def of(cls, dtype: str) -> Precision:
        """Return those of a recipe's dtype, "bf16" or "fp32"."""
        return cls() if dtype == "bf16" else cls(weight=4, main=0)


def data_parallel(layout: Layout, world: int) -> tuple[int, int]:
    """Ranks over which optimiser states are sharded, (of dense, of expert parameters).

    As in Megatron: dense = world / (tp pp), which is dp x cp; expert = world / (ep etp pp), the
    expert-data-parallel group.
    """
    return world // (layout.tp * layout.pp), world // (layout.ep * layout.etp * layout.pp)


def states(
    size: ModelSize,
    layout: Layout,
    world: int,
    precision: Precision,
    stage: int,
    distributed: bool = True,
) -> Memory:
    """Weights, gradients and optimiser states of one rank of stage `stage`.

    Bytes of weights = parameters x weight; of gradients = parameters x gradient; of the optimiser
    = (dense / dense ranks + expert / expert ranks) x (main + moments), ranks as `data_parallel` has
    them, or 1 where the optimizer is not distributed.
    """
    share = size.share(layout, stage)
    dense, expert = data_parallel(layout, world) if distributed else (1, 1)
    sharded = share.dense / dense + share.expert / expert
    return Memory(
        weights=share.total * precision.weight,
        gradients=share.total * precision.gradient,
        optimizer=sharded * (precision.main + precision.moments),
    )


def head_bytes(
    size: ModelSize, layout: Layout, tokens: int, training: bool = True, rows: int = HEAD_ROWS
) -> float:
    """Bytes of the LM head on the last stage: a tile of logits, and in training both gradients.

    Training = 2 rows V / tp + 6 h (V / tp + tokens / cp): the bf16 product, over which its gradient
    is written; fp32 gradients of the head and of the hidden states, and both in bf16 (V: size of
    the vocabulary). Scoring = 10 rows V / tp: the bf16 product, and where the top K are looked for
    fp32 logits and 4 bytes that sort them. See loss/logprobs.py and loss/linear_loss.py.
    """
    vocab, local = size.vocab / layout.tp, tokens / layout.cp
    tile = min(rows, local) * vocab
    if not training:
        return tile * 10
    return tile * 2 + (vocab + local) * size.hidden * 6


def training(
    size: ModelSize,
    layout: Layout,
    world: int,
    tokens: int,
    recompute: str = "none",
    precision: Precision | None = None,
    distributed: bool = True,
) -> Memory:
    """Memory of a trainer's busiest rank: of the fullest of its unlike pipeline stages.

    Bytes = states + activations + head (last stage only) + receive buffers. world: all ranks;
    tokens: of a micro-batch, before cp cuts it; precision: default bf16.
    """
    precision = precision or Precision()

    def at(stage: int) -> Memory:
        base = states(size, layout, world, precision, stage, distributed)
        is_last = stage == layout.pp - 1
        return replace(
            base,
            activations=activation_bytes(size, layout, tokens, recompute, stage),
            head=head_bytes(size, layout, tokens) if is_last else 0,
            communication=buffer_bytes(size, layout, tokens),
        )

    stages = distinct_stages(layout, size.layers)
    return max(map(at, stages), key=lambda memory: memory.total)


def scoring(size: ModelSize, layout: Layout, tokens: int, width: int = 2) -> Memory:
    """Memory of a rank that only scores (forward passes).

    Bytes = width x parameters of its largest stage + one layer's attention and MLP x tokens / cp
    + a tile of logits + receive buffers. tokens: of a micro-batch, before cp cuts it.
    """
    stages = distinct_stages(layout, size.layers)
    weights = max(size.share(layout, stage).total for stage in stages) * width
    layer = attention_bytes(size, layout, width) + mlp_bytes(size, layout, width)
    return Memory(
        weights=weights,
        activations=layer * tokens / layout.cp,
        head=head_bytes(size, layout, tokens, training=False),
        communication=buffer_bytes(size, layout, tokens, width),
    )


def kv_bytes(size: ModelSize, tp: int, width: int = 2) -> float:
    """Bytes of the KV cache per token, on one GPU of an engine.

    = 2 (key and value) x width x layers x head size x key-value heads / tp; tp beyond the number of
    heads copies them, so at least one head.
    """
    return 2 * width * size.layers * size.head * max(1, size.kv_heads / tp)


def engine(size: ModelSize, tp: int, gpu: Gpu, fraction: float, width: int = 2) -> Memory:
    """Memory of a rank of an engine's server, which takes `fraction` of its GPU.

    Bytes of weights = parameters x width / tp; of the KV cache = the GPU's memory x fraction -
    weights, negative where the weights alone are more.
    """
    weights = size.parameters * width / tp
    return Memory(weights=weights, kv_cache=gpu.memory * fraction - weights)
