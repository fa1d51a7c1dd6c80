"""One batch of prompts, decoded to its end.

Rows whose answers have ended leave the batch when enough of them have: what a step costs goes with
its rows. Shapes: B rows, W the longest prompt, M most tokens of an answer.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from iwopd_megatron.rollout.decoder import Decoder
from iwopd_megatron.rollout.drawing import draw
from iwopd_megatron.rollout.engine import Sampling
from iwopd_megatron.rollout.threads import Threads

KEPT = 0.5  # rows leave once no more than this share of them goes on
FEW_ROWS = 16  # a product of so many takes as long as reading its weight: fewer gain nothing


@dataclass
class Batch:
    """Prompts to continue, padded on the left."""

    ids: torch.Tensor  # int64 [B, W]
    visible: torch.Tensor  # bool [B, W + M], False on padding, which is never attended to
    uniform: torch.Tensor  # float64 [B, M] in [0, 1)
    limit: torch.Tensor  # int64 [B], tokens to write at most


def decode(
    model: Decoder, batch: Batch, eos_ids: torch.Tensor, sampling: Sampling, threads: Threads
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return tokens and log-probs `[B, M]`; what they are after a row's end is of no meaning.

    A row ends with one of `eos_ids` or at its limit.
    """
    ids, visible, uniform, limit = batch.ids, batch.visible, batch.uniform, batch.limit
    (rows, width), steps = ids.shape, uniform.shape[1]
    cache = model.new_cache(rows, visible.shape[1])
    tokens = ids.new_zeros(rows, steps)
    logps = torch.zeros(rows, steps, device=ids.device)
    row, done = torch.arange(rows, device=ids.device), torch.zeros_like(limit, dtype=torch.bool)
    positions = (visible[:, :width].cumsum(1) - 1).clamp(min=0)
    is_padded = not bool(visible.all())
    start, mask = 0, causal_mask(visible[:, :width]) if is_padded else None
    packed = None
    for step in range(steps):
        logits = model(ids, positions, cache, start, mask, packed)
        token, logp = draw(logits.float(), uniform[:, step], sampling)
        tokens[row, step], logps[row, step] = token, logp
        done |= torch.isin(token, eos_ids) | (limit <= step + 1)
        left = len(done) - int(done.sum())
        if not left:
            break
        ids, positions, start = token[:, None], positions[:, -1:] + 1, width + step
        must_pack = step == 0  # after the prompts, whose pass has memory of its own
        if left <= KEPT * len(done):
            must_pack |= len(done) > FEW_ROWS
            kept = (~done).nonzero().squeeze(1)
            ids, positions, visible, uniform, limit, row, done = (
                part[kept] for part in (ids, positions, visible, uniform, limit, row, done)
            )
            cache = [(_kept(k, kept, -1, start), _kept(v, kept, 2, start)) for k, v in cache]
        if must_pack:
            packed = None  # makes room
            packed = model.packed(left, steps - step, threads)
        mask = visible[:, None, None, : start + 1] if is_padded else None
    return tokens, logps


def _kept(slots: torch.Tensor, kept: torch.Tensor, dim: int, used: int) -> torch.Tensor:
    """Return the first rows of `slots`, to which `used` slots along `dim` of the kept have moved.

    Within the memory that is there: a copy would take as much again, all layers together.
    """
    slots.narrow(dim, 0, used)[: len(kept)] = slots.narrow(dim, 0, used)[kept]
    return slots[: len(kept)]


def causal_mask(visible: torch.Tensor) -> torch.Tensor:
    """Return the mask `[B, 1, W, W]` of left-padded prompts, `visible` being `[B, W]`.

    Padding sees itself: the softmax of a row without anything visible would be NaN.
    """
    width = visible.shape[1]
    causal = torch.ones(width, width, dtype=torch.bool, device=visible.device).tril()
    itself = torch.eye(width, dtype=torch.bool, device=visible.device)
    return (causal & (visible[:, None, :] | itself))[:, None]
