"""Bytes of activations of one layer's attention; activations.py says what the letters mean."""

from __future__ import annotations

from iwopd_megatron.config.models import Layout
from iwopd_megatron.plan.model_size import ModelSize


def attention_bytes(size: ModelSize, layout: Layout, width: int = 2) -> float:
    """Bytes of one layer's attention, per token = (w (2h + 4q + 3k) + 4 (2n + m + 1)) / tp.

    2h: the norm's input and output. 4q: queries as projected, as copied out of between keys and
    values (but where a rank has one head of these: 3q), as turned (rotary), and the attention's
    output. 3k: keys as projected and as turned, values. In fp32, flash attention's log-sum of every
    head (4n) and the factor of every norm: the heads' (4n + 4m) and the layer's.
    Without norms on queries and keys = (w (2h + 3q + 3k) + 4 (n + 1)) / tp: no copy is kept.
    """
    if size.kv_rank:
        return _latent_bytes(size, layout, width)
    kept, factors = 2 * size.hidden + 3 * size.queries + 3 * size.keys, size.heads + 1
    if size.qk_norm:
        kept += size.queries * (size.kv_heads > layout.tp)
        factors += size.heads + size.kv_heads
    return (width * kept + 4 * factors) / layout.tp


def _latent_bytes(size: ModelSize, layout: Layout, width: int) -> float:
    """Bytes of one layer's latent attention, per token.

    = (w (2h + 2 q_rank + 2 kv_rank + turned + 4q + v) + 4 (n + 2)) / tp, v the heads' values:
    latents before and after their norms, with the rotary key; queries and keys as turned, values
    and the output, padded to their size, and what of the output is no padding. Where values are as
    wide 2q + up + v: keys and values as projected (up). In fp32 a factor more where queries have a
    latent.
    """
    kept = 2 * size.hidden + 2 * size.q_rank + 2 * size.kv_rank + size.turned
    kept += 2 * size.queries + size.values
    kept += 2 * size.queries if size.values < size.queries else size.kv_up
    return (width * kept + 4 * (size.heads + 2 + (size.q_rank > 0))) / layout.tp
