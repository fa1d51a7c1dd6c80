"""Bytes of activations, by formula: per token and layer, per micro-batch in flight, and buffers.

Counted as Korthikanti et al., arXiv 2205.05198, equations 1 to 6, but for what these layers keep:
grouped queries with query and key norms, flash attention (no score matrix), SwiGLU, experts, no
dropout. Tensor and sequence parallelism together cut all of it by tp (section 4.2.2 there). In the
formulas

    h = hidden size             q = query heads x head size     k = key-value heads x head size
    f = width of the MLP        n = query heads                 E, K = experts, experts a token
    m = key-value heads         w = bytes of an element
    tp, pp, vpp, ep, etp, cp = the layout's degrees

tests/test_plan_measured.py holds the formulas against tensors that Megatron's layers save.
"""

from __future__ import annotations

from iwopd_megatron.config.models import Layout
from iwopd_megatron.config.stages import stage_layers
from iwopd_megatron.plan.model_size import ModelSize


def attention_bytes(size: ModelSize, layout: Layout, width: int = 2) -> float:
    """Bytes of one layer's attention, per token = (w (2h + 3q + 3k) + 4 (2n + m + 1)) / tp.

    2h: the norm's input and output. 3q: queries as projected, as turned (rotary), and the
    attention's output. 3k: keys as projected and as turned, values. In fp32, flash attention's
    log-sum of every head (4n) and the factor of every norm: the heads' (4n + 4m) and the layer's.
    With TransformerEngine; the native attention copies its output once more.
    """
    kept = 2 * size.hidden + 3 * size.queries + 3 * size.keys
    return (width * kept + 4 * (2 * size.heads + size.kv_heads + 1)) / layout.tp


def mlp_bytes(size: ModelSize, layout: Layout, width: int = 2) -> float:
    """Bytes of one layer's MLP or experts, per token.

    Dense = (w (2h + 3f) + 4) / tp: the norm's input, output and fp32 factor; gate, up and product.
    Experts = (w (2h + K etp (h + 3f / etp)) + 4 + 24K + 8E) / tp: each of the K copies of a
    token's input, which every rank of an etp group holds, with its part of gate, up and product.
    24K: which experts and in which order (int64), their fp32 probabilities before and after the
    dispatch. 8E: the int64 order of all tokens for all experts, of which Megatron 0.17 and later
    use the first K; 0.16 keeps 5E instead, fp32 probabilities and a map of bools.
    """
    kept: float = 2 * size.hidden
    if not size.experts:
        return (width * (kept + 3 * size.ffn) + 4) / layout.tp
    copies = size.topk * layout.etp
    kept += copies * (size.hidden + 3 * size.ffn / layout.etp)
    return (width * kept + 4 + 24 * size.topk + 8 * size.experts) / layout.tp


def layer_bytes(size: ModelSize, layout: Layout, recompute: str, width: int = 2) -> float:
    """Bytes that one layer keeps from forward to backward, per token, by `recompute`.

    none = attention + MLP. selective = attention + 2 w h / tp: the MLP is computed again from its
    norm's input and output (recomputing a flash attention frees nothing). full = w h / tp: the
    layer's input.
    """
    if recompute == "full":
        return width * size.hidden / layout.tp
    if recompute == "selective":
        return attention_bytes(size, layout, width) + 2 * width * size.hidden / layout.tp
    return attention_bytes(size, layout, width) + mlp_bytes(size, layout, width)


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
    chunks = [len(chunk) for chunk in stage_layers(layout, size.layers)[stage]]
    passes = round(in_flight(layout, stage) * layout.vpp)
    return sum(chunks[i // layout.pp % layout.vpp] for i in range(passes))


def activation_bytes(
    size: ModelSize, layout: Layout, tokens: int, recompute: str, stage: int, width: int = 2
) -> float:
    """Bytes of activations of a rank of pipeline stage `stage` (0 first).

    = tokens / cp x (kept + hidden + again + widest), where, in bytes per token,
    kept = layer_bytes x layers_in_flight: from forward to backward;
    hidden = w h / tp for the final norm, and on the first stage as much again for the embedding;
    again = mlp_bytes (selective) or attention_bytes + mlp_bytes (full): the layer computed again;
    widest = w 2f K / tp: the gradients of gate and up, while backward passes through them.
    tokens: of a micro-batch, before cp cuts it.
    """
    local = tokens / layout.cp
    total = layer_bytes(size, layout, recompute, width) * layers_in_flight(size, layout, stage)
    total += width * size.hidden / layout.tp * (1 + (stage == 0))
    if recompute != "none":
        total += mlp_bytes(size, layout, width)
        total += attention_bytes(size, layout, width) if recompute == "full" else 0
    widest = (2 * size.ffn / layout.etp if size.experts else 2 * size.ffn) * width
    total += widest * size.topk * layout.etp / layout.tp
    return total * local


def buffer_bytes(size: ModelSize, layout: Layout, tokens: int, width: int = 2) -> float:
    """Bytes of communication's receive buffers, which live beside the activations.

    = 2 w h x (gathered + dispatched): gathered = tokens / cp where tp > 1, the whole sequence of
    a tensor-parallel group; dispatched = tokens / (cp tp) x K etp where ep etp > 1, the copies of
    tokens that experts get.
    """
    local = tokens / layout.cp
    gathered = 2 * width * size.hidden * local if layout.tp > 1 else 0
    rows = local / layout.tp * size.topk * layout.etp if layout.ep * layout.etp > 1 else 0
    return gathered + 2 * width * size.hidden * rows
