"""Bytes of one GPU: weights, gradients, optimiser, activations, head, and an engine's KV cache.

Weights and optimiser: as Megatron's distributed optimizer allocates them (its documentation,
"Distributed Optimizer": 6 + 12 / dp bytes a parameter in bf16, 18 without). Activations:
Korthikanti et al., arXiv 2205.05198, Eq. 1-6, counted anew for what these layers keep: grouped
queries with query and key norms, flash attention (no score matrix), SwiGLU, experts, no dropout.
Pipeline: the same, section 4.2.3, and Narayanan et al., arXiv 2104.04473, section 2.2. All at the
busiest rank.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from iwopd_megatron.config.models import Layout
from iwopd_megatron.plan.hardware import CONTEXT, FRAGMENTATION, Gpu
from iwopd_megatron.plan.model_size import ModelSize

HEAD_ROWS = 2048  # logprobs.GPU_TILE and linear_loss.GPU_CHUNK, whose modules import torch


@dataclass(frozen=True)
class Memory:
    """Bytes by purpose; `total` is what the allocator reserves, with the context."""

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
        return ((name, value) for name, value in vars(self).items() if value)

    @property
    def allocated(self) -> float:
        return sum(value for _, value in self.items()) - self.context

    @property
    def total(self) -> float:
        """An engine takes its cache in one piece, which does not fragment."""
        pool = self.kv_cache
        return (self.allocated - pool) * FRAGMENTATION + pool + self.context


@dataclass(frozen=True)
class Precision:
    """Bytes a parameter. Published runs also keep bf16 gradients or half of the main weights."""

    weight: int = 2
    gradient: int = 4  # DDP sums gradients in fp32
    main: int = 4  # fp32 main weights; none beside fp32 weights
    moments: int = 8

    @classmethod
    def of(cls, dtype: str) -> Precision:
        return cls() if dtype == "bf16" else cls(weight=4, main=0)


def data_parallel(layout: Layout, world: int) -> tuple[int, int]:
    """Ranks over which optimiser states of dense and of expert parameters are sharded, cp included.

    Megatron: dense over dp x cp, experts over the expert-data group.
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
    """Weights, gradients and optimiser states of one rank."""
    share = size.share(layout, stage)
    dense, expert = data_parallel(layout, world) if distributed else (1, 1)
    sharded = share.dense / dense + share.expert / expert
    return Memory(
        weights=share.total * precision.weight,
        gradients=share.total * precision.gradient,
        optimizer=sharded * (precision.main + precision.moments),
    )


def attention_bytes(size: ModelSize, layout: Layout, width: int = 2) -> float:
    """Kept per token by a layer's attention: norm's input and output, projected queries, keys and
    values, turned queries and keys, the attention's output and its fp32 log-sum a head.

    With TransformerEngine's modules; the native attention copies its output once more.
    """
    kept = 2 * size.hidden + 3 * size.queries + 3 * size.keys
    return (width * kept + 4 * size.heads) / layout.tp


def mlp_bytes(size: ModelSize, layout: Layout, width: int = 2) -> float:
    """Kept per token by a layer's MLP or experts.

    Norm's input and output, gate and up, their product; for experts each of the top-k copies of a
    token's input besides, with etp all copies of the group and a part of the width.
    """
    kept = 2 * size.hidden
    if not size.experts:
        return width * (kept + 3 * size.ffn) / layout.tp
    copies = size.topk * layout.etp
    kept += copies * (size.hidden + 3 * size.ffn / layout.etp)
    return (width * kept + 8 * size.experts) / layout.tp  # router: fp32 logits and probabilities


def layer_bytes(size: ModelSize, layout: Layout, recompute: str, width: int = 2) -> float:
    """Kept per token by one layer between forward and backward.

    full: the layer's input. selective: the attention's tensors (recomputing a flash attention
    frees nothing) and the MLP's input.
    """
    if recompute == "full":
        return width * size.hidden / layout.tp
    if recompute == "selective":
        return attention_bytes(size, layout, width) + 2 * width * size.hidden / layout.tp
    return attention_bytes(size, layout, width) + mlp_bytes(size, layout, width)


def in_flight(layout: Layout, stage: int) -> float:
    """Micro-batches whose activations a stage holds at once, 1F1B, in whole stages.

    Interleaved (vpp > 1): Megatron's warm-up of 2 (pp - 1 - stage) + (vpp - 1) pp chunks, and one;
    on the first stage that is pp times 1 + (pp - 1) / (pp vpp).
    """
    behind = layout.pp - 1 - stage
    if layout.vpp == 1:
        return behind + 1
    return (2 * behind + (layout.vpp - 1) * layout.pp + 1) / layout.vpp


def activations(
    size: ModelSize, layout: Layout, tokens: int, recompute: str, stage: int, width: int = 2
) -> float:
    """Bytes a rank keeps, `tokens` of a micro-batch before the context-parallel cut.

    One layer is held whole besides when it is computed again.
    """
    local = tokens / layout.cp
    kept = layer_bytes(size, layout, recompute, width) * size.layers / layout.pp
    total = kept * in_flight(layout, stage)
    total += width * size.hidden / layout.tp * (1 + (stage == 0))  # final norm; embedding
    if recompute != "none":
        total += mlp_bytes(size, layout, width)
        total += attention_bytes(size, layout, width) if recompute == "full" else 0
    # Backward: the gradient of the widest tensors beside them.
    widest = (2 * size.ffn / layout.etp if size.experts else 2 * size.ffn) * width
    total += widest * size.topk * layout.etp / layout.tp
    return total * local


def head_bytes(
    size: ModelSize, layout: Layout, tokens: int, training: bool = True, rows: int = HEAD_ROWS
) -> float:
    """LM head: a tile of logits, and in training both gradients (loss/logprobs.py, linear_loss.py).

    A tile: the bf16 product, over which its gradient goes; where the top K are looked for, fp32
    logits and what sorts them. Training: fp32 gradients of the head and of the hidden states, and
    both in bf16.
    """
    vocab, local = size.vocab / layout.tp, tokens / layout.cp
    tile = min(rows, local) * vocab
    if not training:
        return tile * 10
    return tile * 2 + (vocab + local) * size.hidden * 6


def communication(size: ModelSize, layout: Layout, tokens: int, width: int = 2) -> float:
    """Receive buffers that live beside the tensors kept: gathered sequence, dispatched tokens."""
    local = tokens / layout.cp
    gathered = 2 * width * size.hidden * local if layout.tp > 1 else 0
    rows = local / layout.tp * size.topk * layout.etp if layout.ep * layout.etp > 1 else 0
    return gathered + 2 * width * size.hidden * rows


def training(
    size: ModelSize,
    layout: Layout,
    world: int,
    tokens: int,
    recompute: str = "none",
    precision: Precision | None = None,
    distributed: bool = True,
) -> Memory:
    """The busiest rank of a trainer: its first or its last pipeline stage."""
    precision = precision or Precision()

    def at(stage: int) -> Memory:
        base = states(size, layout, world, precision, stage, distributed)
        is_last = stage == layout.pp - 1
        return replace(
            base,
            activations=activations(size, layout, tokens, recompute, stage),
            head=head_bytes(size, layout, tokens) if is_last else 0,
            communication=communication(size, layout, tokens),
        )

    return max((at(stage) for stage in {0, layout.pp - 1}), key=lambda memory: memory.total)


def scoring(size: ModelSize, layout: Layout, tokens: int, width: int = 2) -> Memory:
    """A rank that only scores: weights, one layer's tensors, a tile of logits."""
    weights = max(size.share(layout, stage).total for stage in {0, layout.pp - 1}) * width
    layer = attention_bytes(size, layout, width) + mlp_bytes(size, layout, width)
    return Memory(
        weights=weights,
        activations=layer * tokens / layout.cp,
        head=head_bytes(size, layout, tokens, training=False),
        communication=communication(size, layout, tokens, width),
    )


def kv_bytes(size: ModelSize, tp: int, width: int = 2) -> float:
    """KV cache of one token on one GPU; tp beyond the key-value heads copies them."""
    return 2 * width * size.layers * size.head * max(1, size.kv_heads / tp)


def engine(size: ModelSize, tp: int, gpu: Gpu, fraction: float, width: int = 2) -> Memory:
    """A rank of an engine server: weights, and the rest of `fraction` of the GPU as KV cache.

    kv_cache is negative where the weights alone exceed it.
    """
    weights = size.parameters * width / tp
    return Memory(weights=weights, kv_cache=gpu.memory * fraction - weights)
