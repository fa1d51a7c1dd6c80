"""Bytes of activations, by formula: per token and layer, per micro-batch in flight, and buffers.

Counted as Korthikanti et al., arXiv 2205.05198, equations 1 to 6, but for what these layers keep:
grouped queries with query and key norms, flash attention (no score matrix), SwiGLU, experts, no
dropout. Tensor and sequence parallelism together cut all of it by tp (section 4.2.2 there). In the
formulas

    h = hidden size             q = query heads x head size     k = key-value heads x head size
    f = width of the MLP        n = query heads                 E, K = experts, experts a token
    m = key-value heads         w = bytes of an element         S = width of a shared expert
    tp, pp, vpp, ep, etp, cp = the layout's degrees
    hot = tokens of the busiest expert rank over the mean

Counted is what the torch-native modules allocate on a GPU, sequences of a micro-batch of one
length. TransformerEngine's fused kernels need less while backward runs; packing unequal lengths
pads queries, keys and values. tests/with_runs/test_plan_peaks.py holds them against live tensors.
"""

from __future__ import annotations

from iwopd_megatron.config.models import Layout
from iwopd_megatron.config.stages import stage_layers
from iwopd_megatron.plan.attention_bytes import attention_bytes
from iwopd_megatron.plan.model_size import ModelSize


def mlp_bytes(size: ModelSize, layout: Layout, width: int = 2, hot: float = 1.0) -> float:
    """Bytes of one layer's MLP or experts, per token.

    Dense = (w (2h + 3f) + 4) / tp: the norm's input, output and fp32 factor; gate, up and product.
    Experts = (w (2h + K etp hot (h + 3f / etp)) + 4 + 24K + 8E) / tp: each of the K copies of a
    token's input, which every rank of an etp group holds, with its part of gate, up and product.
    24K: which experts and in which order (int64), their fp32 probabilities before and after the
    dispatch. 8E: the int64 order of all tokens for all experts, of which Megatron 0.17 and later
    use the first K; 0.16 keeps 5E instead, fp32 probabilities and a map of bools. Sigmoid scores =
    (4E + 4) / tp more: all of them in fp32, and the sum of the chosen ones'. Groups of experts =
    (16G + 8 (K // 2) + E) / tp more: each one's best two, those chosen (int64), a map of bools.
    A shared expert = w 3S / tp more: gate, up and product; with a gate, w (h + 1) / tp for its
    output and the sigmoid that scales it.
    """
    kept: float = 2 * size.hidden
    if not size.experts:
        return (width * (kept + 3 * size.ffn) + 4) / layout.tp
    copies = size.topk * layout.etp * hot
    kept += copies * (size.hidden + 3 * size.ffn / layout.etp)
    kept += 3 * size.shared + size.gates * (size.hidden + 1)
    routed = 24 * size.topk + (8 + 4 * size.sigmoid) * size.experts + 4 * size.sigmoid
    if size.groups:
        routed += 16 * size.groups + 8 * (size.topk // 2) + size.experts
    return (width * kept + 4 + routed) / layout.tp


def layer_bytes(
    size: ModelSize, layout: Layout, recompute: str, width: int = 2, hot: float = 1.0
) -> float:
    """Bytes that one layer keeps from forward to backward, per token, by `recompute`.

    none = attention + MLP. selective = attention + (2 w h + 4 - 4n) / tp: the MLP is computed again
    from its norm's input, output and factor, attention's scores and their log-sum from the queries
    and keys; where these have no norms, they are turned again, too, from what was projected, and
    w k / tp less are kept, or w (q + k) / tp where no copy of the queries is made. Latent attention
    is not computed again. full = w h / tp: the layer's input.
    """
    if recompute == "full":
        return width * size.hidden / layout.tp
    if recompute == "selective":
        kept = 2 * width * size.hidden + 4 - 4 * size.heads * (not size.kv_rank)
        if not size.qk_norm and not size.kv_rank:
            kept -= width * (size.keys + size.queries * (size.kv_heads <= layout.tp))
        return attention_bytes(size, layout, width) + kept / layout.tp
    return attention_bytes(size, layout, width) + mlp_bytes(size, layout, width, hot)


def in_flight(layout: Layout, stage: int) -> float:
    """Micro-batches whose activations stage `stage` (0 first) holds at once, in whole stages.

    Where all of its chunks have as many layers; `layers_in_flight` counts them one by one.

    1F1B = pp - stage (Narayanan et al., arXiv 2104.04473, section 2.2). Interleaved, vpp > 1 =
    (2 (pp - 1 - stage) + (vpp - 1) pp + 1) / vpp: Megatron's warm-up chunks and the one after them,
    each 1 / vpp of a stage. On stage 0 that is pp (1 + (pp - 1) / (pp vpp)), as arXiv 2205.05198,
    section 4.2.3, has it.
    """
    behind = layout.pp - 1 - stage
    if layout.vpp == 1:
        return behind + 1
    return (2 * behind + (layout.vpp - 1) * layout.pp + 1) / layout.vpp


def layers_in_flight(size: ModelSize, layout: Layout, stage: int) -> float:
    """Layers of stage `stage` whose activations it holds at once, one for each micro-batch.

    = layers of every chunk x how many of the micro-batches in flight are in it: 1F1B pp - stage;
    interleaved, the first 2 (pp - 1 - stage) + (vpp - 1) pp + 1 passes, of which each chunk in turn
    has pp.
    """
    return _over_passes(layout, stage, list(map(len, stage_layers(layout, size.layers)[stage])))


def _over_passes(layout: Layout, stage: int, chunks: list[int]) -> int:
    """Return the sum over the passes in flight of a number that each chunk has."""
    passes = round(in_flight(layout, stage) * layout.vpp)
    return sum(chunks[i // layout.pp % layout.vpp] for i in range(passes))


def _kept(
    size: ModelSize, layout: Layout, recompute: str, stage: int, width: int, hot: float
) -> float:
    """Bytes per token that all layers in flight keep, each as layers of its kind do."""
    plain = [size.dense_of(chunk) for chunk in stage_layers(layout, size.layers)[stage]]
    dense = _over_passes(layout, stage, plain)
    kept = layer_bytes(size, layout, recompute, width, hot)
    return (
        kept * (layers_in_flight(size, layout, stage) - dense)
        + layer_bytes(size.dense, layout, recompute, width) * dense
    )


def activation_bytes(
    size: ModelSize,
    layout: Layout,
    tokens: int,
    recompute: str,
    stage: int,
    width: int = 2,
    hot: float = 1.0,
) -> tuple[float, float]:
    """Bytes of activations of a rank of pipeline stage `stage` (0 first), at its two fullest times.

    While the LM head runs = tokens / cp x (kept + (2 w h + 4) / tp): the final norm's input, output
    and factor. While the last layer's backward runs = tokens / cp x (kept + `_again` + w h / tp) +
    `_gradients`: the layer computed again, the gradient that came to it; + w h V / tp for a tied
    head's gradient, which waits for the embedding's. Where kept =
    layer_bytes x layers_in_flight + w h / tp x in_flight but on the last stage: from forward to
    backward, with the stage's output. tokens: of a micro-batch, before cp cuts it.
    """
    local, hidden = tokens / layout.cp, width * size.hidden / layout.tp
    kept = _kept(size, layout, recompute, stage, width, hot)
    kept += hidden * (stage < layout.pp - 1) * in_flight(layout, stage)
    again = _again(size, layout, recompute, width, hot)
    layer = local * (kept + again + hidden) + _gradients(size, layout, local, width, hot)
    if size.tied and layout.pp == 1:
        layer += width * size.vocabulary / layout.tp
    return local * (kept + 2 * hidden + 4 / layout.tp), layer


def _again(size: ModelSize, layout: Layout, recompute: str, width: int, hot: float) -> float:
    """Bytes per token of a layer's second run, with its output: none = 0.

    Full = attention_bytes + mlp_bytes, as the layer's input is kept already. Selective = mlp_bytes
    - w h / tp, as the norm's input and output are.
    """
    if recompute == "none":
        return 0.0
    mlp = mlp_bytes(size, layout, width, hot)
    if recompute == "selective":
        return mlp - width * size.hidden / layout.tp
    return attention_bytes(size, layout, width) + mlp


def _gradients(size: ModelSize, layout: Layout, local: float, width: int, hot: float) -> float:
    """Bytes that an MLP's run adds to what it saves, for `local` tokens: the most of its steps.

    Dense = 5 w f / tp a token: gradients of product, gate and up, and SwiGLU's three intermediate
    tensors, without the product, which is free by then; + w h f / tp for a weight's gradient.
    Experts, of R = K etp hot / tp copies a token, with W = E h f / (ep etp) weights a projection:
    SwiGLU's backward, fp32 as probabilities are = R (3w + 12) f / etp + w W; the down projection's
    = R w (h + f / etp) + w W; the up projection's = R w (h - f / etp) + 2 w W; and, dispatched to
    other ranks, the forward run's end = R w 3h + w h K / tp: outputs, in both orders, and copies as
    sent and as received, which Megatron's callers hold. Then a shared expert's as a dense MLP's,
    with the gradient that came back through the others, w h / tp, and of its gate the scaled
    output's and the gate's, 2 w h / tp.
    """
    if not size.experts:
        return width * size.ffn / layout.tp * (5 * local + size.hidden)
    rows = local / layout.tp * size.topk * layout.etp * hot
    ffn = size.ffn / layout.etp
    weights = width * size.experts / layout.ep * size.hidden * ffn
    steps = [
        rows * (3 * width + 12) * ffn + weights,
        rows * width * (size.hidden + ffn) + weights,
        rows * width * (size.hidden - ffn) + 2 * weights,
    ]
    if layout.ep * layout.etp > 1:
        own = local / layout.tp * size.topk
        steps.append(width * size.hidden * (3 * rows + own))
    if size.shared:
        waiting = (1 + 2 * size.gates) * size.hidden * local
        steps.append(width / layout.tp * (size.shared * (5 * local + size.hidden) + waiting))
    return max(steps)


def scoring_bytes(
    size: ModelSize, layout: Layout, tokens: int, width: int = 2, hot: float = 1.0
) -> float:
    """Bytes of activations of a rank that only scores, at a layer's MLP, where they are most.

    Dense = tokens / cp x w ((4h + 3f) / tp + h + h / tp where tp > 1): embeddings, residual twice
    and norm; gate, up and product; output before and after it is scattered.
    Experts = tokens / cp x (w 4h + 5E + 8K) / tp + R w (2h + max(3f / etp, h + f / etp, 2h)), of
    the R copies of `_gradients` in the order of their tokens and of their experts, their outputs in
    both; + K w h / tp a token where they are dispatched to other ranks, as sent. 5E + 8K: fp32
    probabilities, a map of bools, the order of tokens. A shared expert's output, w h / tp, is there
    meanwhile; it was a dense MLP's run before.
    """
    local, hidden = tokens / layout.cp / layout.tp, width * size.hidden
    out = hidden * layout.tp + hidden * (layout.tp > 1)
    if not size.experts:
        return local * (4 * hidden + 3 * width * size.ffn + out)
    own, ffn = local * size.topk, width * size.ffn / layout.etp
    rows = own * layout.etp * hot
    copies = rows * (2 * hidden + max(3 * ffn, hidden + ffn, 2 * hidden))
    if layout.ep * layout.etp > 1:
        copies += own * hidden
    routed = local * (4 * hidden + 5 * size.experts + 8 * size.topk) + copies
    if not size.shared:
        return routed
    return max(routed + local * hidden, local * (4 * hidden + 3 * width * size.shared + out))


def buffer_bytes(size: ModelSize, layout: Layout, tokens: int, width: int = 2) -> float:
    """Bytes of the buffer that a tensor-parallel group's sequence is gathered into, which stays.

    = w h tokens / cp where tp > 1. Copies of tokens that experts get are among the activations.
    """
    return width * size.hidden * tokens / layout.cp if layout.tp > 1 else 0.0
