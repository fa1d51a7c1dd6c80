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
from iwopd_megatron.plan.activations import activation_bytes, buffer_bytes, scoring_bytes
from iwopd_megatron.plan.hardware import CONTEXT, FRAGMENTATION, Gpu
from iwopd_megatron.plan.model_size import ModelSize

BUCKET = 256 * 2**20  # weights.sync.BUCKET_BYTES, whose module imports torch
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


def head_bytes(size: ModelSize, layout: Layout, tokens: int, rows: int = HEAD_ROWS) -> float:
    """Bytes of the LM head on the last stage in training: tiles of logits, and both gradients.

    = max(4 rows V / tp, 2 h (V / tp + N)) + 4 h (V / tp + N) + 2 h N, N = tokens / cp: two bf16
    tiles, the one begun and the one before, or both gradients in bf16; the gradients of head and
    hidden states in fp32; the hidden states that predict (V: size of the vocabulary). See
    loss/linear_loss.py.
    """
    vocab, local = size.vocab / layout.tp, tokens / layout.cp
    tile = min(rows, local) * vocab
    gradient = (vocab + local) * size.hidden
    return max(4 * tile, 2 * gradient) + 4 * gradient + 2 * local * size.hidden


def scoring_head_bytes(
    size: ModelSize, layout: Layout, tokens: int, topk: bool, rows: int = HEAD_ROWS
) -> float:
    """Bytes of the LM head on the last stage in scoring: tiles of logits.

    = 4 rows V / tp, two bf16 tiles, the one begun and the one before; 10 where the top K are looked
    for: one bf16 tile, its fp32 logits and those of the tile before. See loss/head.py.
    """
    tile = min(rows, tokens / layout.cp) * size.vocab / layout.tp
    return tile * (10 if topk else 4)


def push_bytes(size: ModelSize, layout: Layout, width: int = 2) -> float:
    """Bytes of new weights on their way to the servers, at their fullest moment, at most.

    They come in buckets of BUCKET, or of one tensor: D = w V h, the embedding; of experts B = 2 w E
    h f, a layer's gates and ups. Gathered over n ranks = (1 + 1 / n) of it, + 1 where shards are
    joined (tp, etp > 1); along a pipeline = 2, + 1 of gathered experts. Beside it what is not let
    go yet: BUCKET; of experts B / 2, or 1.5 B where B / 2 < 2 BUCKET. To the servers: + D.
    """
    tp, pp, ranks = layout.tp, layout.pp, layout.ep * layout.etp
    table = max(BUCKET, width * size.vocabulary)
    dense: float = table + (table + BUCKET) * (tp * pp > 1)
    if tp > 1:
        dense = max(dense, (2 + 1 / tp) * table + BUCKET)
    if ranks * pp == 1 or not size.experts:
        return dense
    whole = max(BUCKET, 2 * width * size.experts * size.hidden * size.ffn)
    gathered = (1 + 1 / ranks + (layout.etp > 1)) * (ranks > 1)
    sent = (2 + (layout.ep > 1 and layout.etp == 1)) * (pp > 1)
    last = 1.5 if whole < 4 * BUCKET else 0.5
    return max(dense, whole * (max(gathered, sent) + last))


def moments(
    size: ModelSize,
    layout: Layout,
    world: int,
    tokens: int,
    recompute: str = "none",
    precision: Precision | None = None,
    distributed: bool = True,
    hot: float = 1.0,
) -> list[Memory]:
    """Memory of a trainer's rank of every unlike pipeline stage, at two moments each.

    Bytes = states + the gathered sequence's buffer, with activations and LM head while the head
    runs (last stage only), or activations in a layer's backward. world: all ranks; tokens: of a
    micro-batch, before cp cuts it; precision: default bf16; hot: tokens of the busiest expert rank
    over the mean.
    """
    found, hot = [], hot if layout.ep > 1 else 1.0
    for stage in distinct_stages(layout, size.layers):
        base = states(size, layout, world, precision or Precision(), stage, distributed)
        base = replace(base, communication=buffer_bytes(size, layout, tokens))
        width = (precision or Precision()).weight
        at_head, in_layer = activation_bytes(size, layout, tokens, recompute, stage, width, hot)
        if stage == layout.pp - 1:
            head = head_bytes(size, layout, tokens)
            found.append(replace(base, activations=at_head, head=head))
        found.append(replace(base, activations=in_layer))
    return found


def training(
    size: ModelSize,
    layout: Layout,
    world: int,
    tokens: int,
    recompute: str = "none",
    precision: Precision | None = None,
    distributed: bool = True,
    hot: float = 1.0,
) -> Memory:
    """Memory of a trainer's busiest rank at its fullest moment: the largest of `moments`."""
    found = moments(size, layout, world, tokens, recompute, precision, distributed, hot)
    return max(found, key=lambda memory: memory.total)


def scoring(
    size: ModelSize,
    layout: Layout,
    tokens: int,
    width: int = 2,
    hot: float = 1.0,
    topk: bool = False,
) -> Memory:
    """Memory of a rank that only scores (forward passes), in a layer or in the LM head if more.

    Bytes = width x parameters of its largest stage + the gathered sequence's buffer, and the
    larger of `scoring_bytes` and `scoring_head_bytes` + 2 w h / tp x tokens / cp for hidden states.
    tokens: of a micro-batch, before cp cuts it; topk: the likeliest tokens are looked for.
    """
    weights = (
        max(size.share(layout, stage).total for stage in distinct_stages(layout, size.layers))
        * width
    )
    communication = buffer_bytes(size, layout, tokens, width)
    hidden = 2 * width * size.hidden / layout.tp * tokens / layout.cp
    layer = scoring_bytes(size, layout, tokens, width, hot if layout.ep > 1 else 1.0)
    head = scoring_head_bytes(size, layout, tokens, topk)
    if layer > head + hidden:
        return Memory(weights=weights, activations=layer, communication=communication)
    return Memory(weights=weights, activations=hidden, head=head, communication=communication)


def kv_bytes(size: ModelSize, tp: int, width: int = 2) -> float:
    """Bytes of the KV cache per token, on one GPU of an engine.

    = 2 (key and value) x width x layers x head size x key-value heads / tp; tp beyond the number of
    heads copies them, so at least one head.
    """
    return width * size.layers * size.cached(tp)


def engine(size: ModelSize, tp: int, gpu: Gpu, fraction: float, width: int = 2) -> Memory:
    """Memory of a rank of an engine's server, which takes `fraction` of its GPU.

    Bytes of weights = parameters x width / tp; of the KV cache = the GPU's memory x fraction -
    weights, negative where the weights alone are more.
    """
    weights = size.parameters * width / tp
    return Memory(weights=weights, kv_cache=gpu.memory * fraction - weights)
