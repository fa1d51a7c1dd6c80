"""Bytes that a rank moves over each axis of its layout: collectives counted as they are issued.

What one rank sends of a collective with n ranks: of an all-gather or a reduce-scatter of S bytes in
all, and of an all-to-all of S bytes of its own, S (n - 1) / n; of an all-reduce twice that.
tests/test_plan_collectives.py counts what is issued, bench/rehearse.py what is moved.
"""

from __future__ import annotations

from iwopd_megatron.config.models import Layout
from iwopd_megatron.config.stages import stage_layers
from iwopd_megatron.plan.memory import data_parallel
from iwopd_megatron.plan.model_size import ModelSize


def dispatches(recompute: str | None) -> int:
    """Return how often a layer's copies of tokens cross to the experts and back in a micro-batch.

    Forward 1 (recompute None); 2 with backward; 3 with the MLP or the layer computed again, two
    all-to-alls each. Left out: with them go probabilities, 4 bytes a copy beside 2 h, and counts by
    expert.
    """
    return {None: 1, "none": 2}.get(recompute, 3)


def sequence_collectives(size: ModelSize, recompute: str | None) -> int:
    """Return how often a layer gathers or scatters the whole sequence over tp in a micro-batch.

    Attention and a dense MLP have one all-gather and one reduce-scatter forward, those and the
    gather of the input again backward (5 in all), and 2 more where computed again; routed experts
    take sequence shards, a shared one does as a dense MLP.
    """
    attention = {None: 2, "full": 7}.get(recompute, 5)
    if size.experts and not size.shared:
        return attention
    return attention + {None: 2, "none": 5}.get(recompute, 7)


def microbatch_bytes(
    size: ModelSize, layout: Layout, tokens: float, recompute: str | None, stage: int = 0
) -> dict[str, float]:
    """Return bytes over each axis that one micro-batch moves on a rank of a pipeline stage.

    tokens: of the micro-batch, before cp cuts it; recompute: None without backward. ep = layers x 2
    x `dispatches` x 2 h copies (R - 1) / R, R = ep etp; tp = layers x `sequence_collectives` x 2 h
    T (tp - 1) / tp; cp = layers x `dispatches` x 4 k / tp x tokens (cp - 1) / cp: keys and values;
    pp = 2 h T / tp for every neighbour, there and back.
    """
    own, local = stage_layers(layout, size.layers)[stage], tokens / layout.cp
    layers, plain = sum(map(len, own)), sum(map(size.dense_of, own))
    found: dict[str, float] = {}
    ranks = layout.ep * layout.etp
    if size.experts and layout.ep > 1:
        copies = local / layout.tp * size.topk * layout.etp
        crossing = 2 * size.hidden * copies * (ranks - 1) / ranks
        found["ep"] = (layers - plain) * 2 * dispatches(recompute) * crossing
    if layout.tp > 1:
        whole = 2 * size.hidden * local * (layout.tp - 1) / layout.tp
        of_kinds = (layers - plain) * sequence_collectives(size, recompute)
        of_kinds += plain * sequence_collectives(size.dense, recompute)
        found["tp"] = of_kinds * whole
    if layout.cp > 1:
        gathered = 4 * size.keys / layout.tp * tokens * (layout.cp - 1) / layout.cp
        found["cp"] = layers * dispatches(recompute) * gathered
    if layout.pp > 1:
        neighbours = (stage > 0) * (recompute is not None) + (stage < layout.pp - 1)
        found["pp"] = layout.vpp * neighbours * 2 * size.hidden * local / layout.tp
    return found


def step_bytes(size: ModelSize, layout: Layout, world: int, stage: int = 0) -> dict[str, float]:
    """Return bytes over the data-parallel axes that an optimiser step moves on a rank.

    = 6 bytes x parameters x (n - 1) / n: gradients scattered in fp32, weights gathered in bf16, of
    dense parameters over their n ranks (dp) and of experts' over theirs (expert dp).
    """
    share, (dense, expert) = size.share(layout, stage), data_parallel(layout, world)
    found = {"dp": 6 * share.dense * (dense - 1) / dense}
    if size.experts:
        found["expert dp"] = 6 * share.expert * (expert - 1) / expert
    return {axis: moved for axis, moved in found.items() if moved}
