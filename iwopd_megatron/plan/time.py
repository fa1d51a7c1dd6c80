"""Seconds of a micro-batch, an optimiser step and a decode step, from roofs and measured rates.

Every product takes the longer of its arithmetic and its weights' way through memory; attention,
saved activations, gradient sums and communication are added, since nothing here overlaps them
unless said. Rates: plan_hardware.Rates.
"""

from __future__ import annotations

from dataclasses import dataclass

from iwopd_megatron.config.models import Layout
from iwopd_megatron.plan.activations import layer_bytes
from iwopd_megatron.plan.hardware import RATES, Gpu, Rates
from iwopd_megatron.plan.memory import data_parallel
from iwopd_megatron.plan.model_size import ModelSize


@dataclass(frozen=True)
class Software:
    """How expert dispatch is done. The default is this trainer's: all-to-all, not overlapped."""

    hidden_dispatch: float = 0.0  # share of the dispatch behind computation
    one_copy_a_node: bool = False  # a token crosses the network once a node (HybridEP, DeepEP)
    fused_gradients: bool = False  # weight gradients summed inside the product
    head_as_layer: bool = False  # the last stage has a layer less for the head, the first for input


@dataclass(frozen=True)
class Workload:
    """One role's model on its GPUs. `tokens`: a micro-batch's, before the context-parallel cut."""

    size: ModelSize
    layout: Layout
    gpu: Gpu
    tokens: float
    length: float  # mean sequence length inside the micro-batch
    gpus_per_node: int = 8
    software: Software = Software()
    rates: Rates = RATES


def forward(load: Workload) -> float:
    """Seconds of one micro-batch's forward pass on the busiest pipeline stage, the last."""
    return _stage(load, _layer(load, 1, False), _head(load, 1))


def forward_backward(load: Workload, recompute: str) -> float:
    """The same with the backward pass and what is computed again: nothing, the MLP, or all."""
    again = {"none": 0.0, "selective": _mlp_share(load.size), "full": 1.0}[recompute]
    return _stage(load, _layer(load, 3 + again, True), _head(load, 3))


def _stage(load: Workload, layer: float, head: float) -> float:
    layers, pp = load.size.layers, load.layout.pp
    if load.software.head_as_layer and pp > 1:
        return max((layers + 2) / pp * layer, ((layers + 2) / pp - 1) * layer + head)
    return layers / pp * layer + head


def _mlp_share(size: ModelSize) -> float:
    mlp = size.topk * size.mlp
    return mlp / (mlp + size.attention)


def _layer(load: Workload, passes: float, trains: bool) -> float:
    """passes: 1 forward, 3 with backward, more with recomputation."""
    size, layout, gpu, rates = load.size, load.layout, load.gpu, load.rates
    local = load.tokens / layout.cp
    seconds = _product(load, local, size.attention / layout.tp, rates.gemm)
    # causal: half of 2 products of length x queries, 2 operations each
    attention = 2 * load.length * size.queries * local / layout.tp
    seconds += attention / (gpu.tflops * rates.attention)
    if size.experts:
        copies = local / layout.tp * size.topk * layout.etp
        weights = size.experts * size.mlp / (layout.ep * layout.etp)
        per_copy = size.mlp / layout.etp
        arithmetic = 2 * copies * per_copy / (gpu.tflops * rates.grouped_gemm)
        seconds += max(arithmetic, 2 * weights / (gpu.hbm * rates.hbm))
        seconds += _dispatch(load, copies) * (1 - load.software.hidden_dispatch)
    else:
        weights = size.mlp / layout.tp
        seconds += _product(load, local, weights, rates.gemm)
    seconds += _sequence_parallel(load, local)
    seconds *= passes
    kept = layer_bytes(size, layout, "none") * local
    seconds += kept * rates.passes * passes / 3 / (gpu.hbm * rates.hbm)
    seconds += (rates.moe_layer if size.experts else rates.dense_layer) * passes / 3
    if trains:
        width = 8 if load.software.fused_gradients else 10  # read and write fp32, read bf16
        seconds += width * (weights + size.attention / layout.tp) / (gpu.hbm * rates.hbm)
    return seconds


def _product(load: Workload, tokens: float, weights: float, rate: float) -> float:
    arithmetic = 2 * tokens * weights / (load.gpu.tflops * rate)
    return max(arithmetic, 2 * weights / (load.gpu.hbm * load.rates.hbm))


def _head(load: Workload, passes: int) -> float:
    weights = load.size.vocabulary / load.layout.tp
    tokens = load.tokens / load.layout.cp
    elementwise = 20 * tokens * load.size.vocab / load.layout.tp / (load.gpu.hbm * load.rates.hbm)
    return passes * (_product(load, tokens, weights, load.rates.gemm) + elementwise / 2)


def _dispatch(load: Workload, copies: float) -> float:
    """Both all-to-alls of a layer's forward pass: a hidden vector for every copy of a token.

    Ranks outside the node are reached by the network, those inside by NVLink, at the same time.
    """
    ranks = load.layout.ep * load.layout.etp
    if ranks == 1:
        return 0.0
    inside = min(ranks, load.gpus_per_node)  # Megatron's expert groups are neighbouring ranks
    size = 2 * load.size.hidden * copies
    nodes = ranks / inside
    crossing = size * (1 - inside / ranks)
    if load.software.one_copy_a_node:
        crossing = min(crossing, size / load.size.topk * (nodes - 1))
    local = size * (inside - 1) / ranks
    gpu, rate = load.gpu, load.rates.link
    return 2 * max(crossing / (gpu.network * rate), local / (gpu.nvlink * rate))


def _sequence_parallel(load: Workload, tokens: float) -> float:
    """Two all-gathers and two reduce-scatters a layer's forward pass over tp (one pair if experts
    take sequence shards), and keys and values gathered over cp.
    """
    layout, size = load.layout, load.size
    pairs = 1 if size.experts else 2
    moved = pairs * 2 * 2 * size.hidden * tokens * (layout.tp - 1) / layout.tp
    moved += 2 * 2 * size.keys / layout.tp * load.tokens * (layout.cp - 1) / layout.cp
    inside = layout.tp * layout.cp <= load.gpus_per_node
    bandwidth = load.gpu.nvlink if inside else load.gpu.network
    return moved / (bandwidth * load.rates.link)


def pipeline(stage: float, layout: Layout, count: float) -> float:
    """`count` micro-batches through a pipeline whose stages take `stage` seconds each.

    (pp - 1) / vpp stage times are idle, Narayanan et al., arXiv 2104.04473, section 2.2.
    """
    return stage * (count + (layout.pp - 1) / layout.vpp)


def optimizer_step(load: Workload, world: int) -> float:
    """Gradients scattered in fp32, states read and written, bf16 weights gathered."""
    share = load.size.share(load.layout, 0)
    dense, expert = data_parallel(load.layout, world)
    inside = world <= load.gpus_per_node
    bandwidth = (load.gpu.nvlink if inside else load.gpu.network) * load.rates.link
    moved = 6 * (share.dense * (dense - 1) / dense + share.expert * (expert - 1) / expert)
    states = share.dense / dense + share.expert / expert
    return moved / bandwidth + 30 * states / (load.gpu.hbm * load.rates.hbm)


def decode_step(load: Workload, batch: float, context: float, tp: int, width: int = 2) -> float:
    """Seconds of one token each for `batch` requests of `context` tokens, on a server of tp GPUs.

    Weights that are read: all but the experts no request chose, 1 - (1 - k / E)^batch of them.
    """
    size, gpu, rates = load.size, load.gpu, load.rates
    dense = size.layers * (size.attention + size.router) + size.vocabulary
    mlps = size.layers * size.mlp
    touched = 1.0
    if size.experts:
        touched = size.experts * (1 - (1 - size.topk / size.experts) ** batch)
    weights = width * (dense + mlps * touched) / tp
    cache = 4 * size.layers * size.head * max(1, size.kv_heads / tp) * context * batch
    memory = (weights + cache) / (gpu.hbm * rates.decode_hbm)
    active = size.layers * (size.attention + size.router + size.topk * size.mlp)
    arithmetic = 2 * batch * (active + size.vocabulary) / tp / (gpu.tflops * rates.grouped_gemm)
    launch = rates.decode_moe_layer if size.experts else rates.decode_layer
    reduce = 2 * rates.decode_all_reduce if tp > 1 else 0
    moved = 2 * 2 * size.hidden * batch * 2 / (gpu.nvlink * rates.link) if tp > 1 else 0
    return max(memory, arithmetic) + size.layers * (launch + reduce + moved)
