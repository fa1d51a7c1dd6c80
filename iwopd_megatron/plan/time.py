"""Seconds of a micro-batch, an optimiser step and a decode step, from peaks and measured rates.

Every product takes the longer of its arithmetic (FLOP / FLOP/s) and its weights' way through memory
(bytes / bytes/s), the roofline of Williams et al., CACM 52(4), 2009; attention, saved activations,
gradient sums and communication are added, since nothing here overlaps them unless said. A peak
counts with the share of it that is reached (plan.hardware.Rates). In the formulas

    h = hidden size             q = query heads x head size     k = key-value heads x head size
    f = width of the MLP        V = vocabulary                  E, K = experts, experts a token
    T = tokens / cp of a micro-batch                            W = weights of a product

A product of T tokens with W weights has 2 T W FLOP; elements are bf16, 2 bytes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from iwopd_megatron.config.models import Layout
from iwopd_megatron.config.stages import layers_of_stages, stage_layers
from iwopd_megatron.plan.activations import layer_bytes
from iwopd_megatron.plan.hardware import RATES, Gpu, Rates
from iwopd_megatron.plan.memory import data_parallel
from iwopd_megatron.plan.model_size import ModelSize
from iwopd_megatron.plan.traffic import dispatches, sequence_collectives


@dataclass(frozen=True)
class Software:
    """What a trainer's software does; the default is this trainer's: all-to-all, not overlapped.

    Others are those of published runs that bench/plan.py compares with.
    """

    hidden_dispatch: float = 0.0  # share of the dispatch behind computation
    one_copy_a_node: bool = False  # a token crosses the network once a node (HybridEP, DeepEP)
    fused_gradients: bool = False  # weight gradients summed inside the product


@dataclass(frozen=True)
class Workload:
    """One role's model on its GPUs. `tokens`: of a micro-batch, before cp cuts it."""

    size: ModelSize
    layout: Layout
    gpu: Gpu
    tokens: float
    length: float  # mean sequence length inside the micro-batch
    gpus_per_node: int = 8
    software: Software = Software()
    rates: Rates = RATES


def forward(load: Workload) -> float:
    """Return seconds of one micro-batch's forward pass on the slowest pipeline stage.

    = layers x layer, and + head on the last; each of one pass.
    """
    return _stage(load, 1, None, _head(load, 1))


def forward_backward(load: Workload, recompute: str) -> float:
    """Return seconds of one micro-batch forward and backward on that stage.

    The same with 3 passes instead of one (backward has two products for each of forward), and
    what is computed again: nothing (none), the MLP's part of a pass (selective), or one (full).
    """
    again = {"none": 0.0, "selective": _mlp_share(load.size), "full": 1.0}[recompute]
    return _stage(load, 3 + again, recompute, _head(load, 3))


def _stage(load: Workload, passes: float, recompute: str | None, head: float) -> float:
    """Return seconds of the slowest stage from seconds of its layers and of the head.

    = max(most layers of a stage x layer, layers of the last x layer + head).
    """
    layer = _layer(load, passes, recompute)
    dense = _layer(replace(load, size=load.size.dense), passes, recompute)
    seconds = []
    for stage in stage_layers(load.layout, load.size.layers):
        plain = sum(map(load.size.dense_of, stage))
        seconds.append((sum(map(len, stage)) - plain) * layer + plain * dense)
    return max(max(seconds), seconds[-1] + head)


def _mlp_share(size: ModelSize) -> float:
    """Return the MLP's share of a layer's weights that a token meets, K MLPs of them."""
    mlp = size.topk * size.mlp + size.shared_mlp
    return mlp / (mlp + size.attention)


def _layer(load: Workload, passes: float, recompute: str | None) -> float:
    """Return seconds of one layer of a micro-batch in so many passes: passes x (

    attention's product: T tokens, h (2q + 2k) / tp weights;
    attention: 2 length q T / tp FLOP, two products of length x q and half of them masked;
    MLP's product: T tokens, 3 h f / tp weights; or of experts: T K etp / tp copies of tokens, each
    2 x 3 h f / etp FLOP, E 3 h f / (ep etp) weights, and the shared expert's product)
    + `dispatches` x the dispatch of the copies + tensor- and context-parallel communication
    + passes / 3 x (bytes kept x `rates.passes` / HBM + `rates.moe_layer` or `dense_layer`)
    + in training 10 bytes a weight / HBM to sum gradients: fp32 read and written, bf16 read.

    passes: 1 forward, 3 with backward, more with recomputation; recompute: None without backward.
    """
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
        if size.shared:
            seconds += _product(load, local, size.shared_mlp / layout.tp, rates.gemm)
            weights += size.shared_mlp / layout.tp
    else:
        weights = size.mlp / layout.tp
        seconds += _product(load, local, weights, rates.gemm)
    seconds *= passes
    if size.experts:
        dispatch = _dispatch(load, copies) * (1 - load.software.hidden_dispatch)
        seconds += dispatch * dispatches(recompute)
    seconds += _sequence_parallel(load, local, recompute)
    kept = layer_bytes(size, layout, "none") * local
    seconds += kept * rates.passes * passes / 3 / (gpu.hbm * rates.hbm)
    seconds += (rates.moe_layer if size.experts else rates.dense_layer) * passes / 3
    if recompute is not None:
        width = 8 if load.software.fused_gradients else 10  # read and write fp32, read bf16
        seconds += width * (weights + size.attention / layout.tp) / (gpu.hbm * rates.hbm)
    return seconds


def _product(load: Workload, tokens: float, weights: float, rate: float) -> float:
    """Return seconds of a product = max(2 tokens weights FLOP / peak, 2 weights bytes / HBM)."""
    arithmetic = 2 * tokens * weights / (load.gpu.tflops * rate)
    return max(arithmetic, 2 * weights / (load.gpu.hbm * load.rates.hbm))


def _head(load: Workload, passes: int) -> float:
    """Return seconds of the LM head = passes x (product + 10 T V / tp bytes / HBM).

    Product: T tokens, V h / tp weights. 10 bytes a logit: what is no product.
    """
    weights = load.size.vocabulary / load.layout.tp
    tokens = load.tokens / load.layout.cp
    elementwise = 20 * tokens * load.size.vocab / load.layout.tp / (load.gpu.hbm * load.rates.hbm)
    return passes * (_product(load, tokens, weights, load.rates.gemm) + elementwise / 2)


def _dispatch(load: Workload, copies: float) -> float:
    """Return seconds of both all-to-alls of a layer's forward pass, to the experts and back.

    = 2 max(crossing / network, local / NVLink), since ranks outside the node are reached by the
    network and those inside by NVLink at the same time. Of 2 h copies bytes, in a group of R = ep
    etp ranks with N in a node: crossing = bytes (1 - N / R), local = bytes (N - 1) / R; with one
    copy a node, crossing is at most bytes / K x (nodes - 1).
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


def _sequence_parallel(load: Workload, tokens: float, recompute: str | None) -> float:
    """Return seconds of a layer's tensor- and context-parallel communication in a micro-batch.

    Bytes = 2 h T (tp - 1) / tp x `sequence_collectives` + 2 x 2 k / tp x tokens (cp - 1) / cp x
    `dispatches`: keys and values are gathered over cp. By NVLink where tp cp ranks are in a node.
    """
    layout, size = load.layout, load.size
    moved = sequence_collectives(size, recompute) * 2 * size.hidden * tokens
    moved *= (layout.tp - 1) / layout.tp
    gathered = 2 * 2 * size.keys / layout.tp * load.tokens * (layout.cp - 1) / layout.cp
    moved += gathered * dispatches(recompute)
    inside = layout.tp * layout.cp <= load.gpus_per_node
    bandwidth = load.gpu.nvlink if inside else load.gpu.network
    return moved / (bandwidth * load.rates.link)


def pipeline(stage: float, layout: Layout, count: float) -> float:
    """Return seconds of `count` micro-batches through a pipeline whose stages take `stage` each.

    = stage x (count + (pp - 1) / vpp): the second term is the idle time of Narayanan et al., arXiv
    2104.04473, section 2.2.
    """
    return stage * (count + (layout.pp - 1) / layout.vpp)


def optimizer_step(load: Workload, world: int) -> float:
    """Return seconds of an optimiser step of `world` ranks, sharded over n = `data_parallel`.

    = 6 bytes x parameters x (n - 1) / n / bandwidth: gradients scattered in fp32 (4), weights
    gathered in bf16 (2); + 30 bytes x parameters / n / HBM: main weights and moments read and
    written (24), gradients read (4), weights written (2). Dense and experts' parameters each with
    their n. parameters: of the stage with most layers.
    """
    layers = layers_of_stages(load.layout, load.size.layers)
    share = load.size.share(load.layout, layers.index(max(layers)))
    dense, expert = data_parallel(load.layout, world)
    inside = world <= load.gpus_per_node
    bandwidth = (load.gpu.nvlink if inside else load.gpu.network) * load.rates.link
    moved = 6 * (share.dense * (dense - 1) / dense + share.expert * (expert - 1) / expert)
    states = share.dense / dense + share.expert / expert
    return moved / bandwidth + 30 * states / (load.gpu.hbm * load.rates.hbm)


def decode_step(load: Workload, batch: float, context: float, tp: int, width: int = 2) -> float:
    """Return seconds of one token each for `batch` requests of `context` tokens, on tp GPUs.

    = max((weights + cache) / HBM, 2 batch active / tp FLOP / peak) + layers x (launch + reduce).
    Bytes of weights = width x parameters / tp but the experts that no request chose, of which each
    is chosen with probability 1 - (1 - K / E)^batch (choices independent and even). Bytes of cache
    = 4 layers x head size x max(1, key-value heads / tp) x context x batch, keys and values in
    bf16. active: parameters in a token's products. reduce, with tp > 1: the latency of two
    all-reduces and, by NVLink, 2 x 2 x 2 h batch bytes.
    """
    size, gpu, rates = load.size, load.gpu, load.rates
    sparse = size.layers - size.dense_layers
    dense = size.layers * size.attention + size.dense_layers * size.dense.mlp + size.vocabulary
    dense += sparse * (size.router + size.shared_mlp)
    mlps = sparse * size.mlp
    touched = 1.0
    if size.experts:
        touched = size.experts * (1 - (1 - size.topk / size.experts) ** batch)
    weights = width * (dense + mlps * touched) / tp
    cache = 4 * size.layers * size.head * max(1, size.kv_heads / tp) * context * batch
    memory = (weights + cache) / (gpu.hbm * rates.decode_hbm)
    arithmetic = 2 * batch * size.active / tp / (gpu.tflops * rates.grouped_gemm)
    launch = rates.decode_moe_layer if size.experts else rates.decode_layer
    reduce = 2 * rates.decode_all_reduce if tp > 1 else 0
    moved = 2 * 2 * size.hidden * batch * 2 / (gpu.nvlink * rates.link) if tp > 1 else 0
    return max(memory, arithmetic) + size.layers * (launch + reduce + moved)
