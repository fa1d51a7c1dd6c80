"""The logits of an LM head one tile at a time: their statistics, and the gradients they give.

Shapes: N tokens, D hidden, V vocabulary shard, K scored ids, C tokens and U entries of a tile.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch

from iwopd_megatron.loss import tile_ops
from iwopd_megatron.loss.tile_ops import EntropyGradient
from iwopd_megatron.loss.topk import RunningTopK

_HAS_OUT_DTYPE = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 8)

# (tokens, vocabulary, product) of a tile
Product = tuple[slice, slice, torch.Tensor]


class Head(NamedTuple):
    """Hidden states and this rank's vocabulary, whose logits exist one tile at a time."""

    hidden_ND: torch.Tensor
    weight_VD: torch.Tensor
    inv_temperature: float
    tile: tuple[int, int]

    def tiles(self) -> Iterator[tuple[slice, slice]]:
        """Yield (tokens, vocabulary) of all tiles; vocabulary outermost: weights stay cached."""
        (tokens, vocab), (rows, columns) = self.tile, (len(self.hidden_ND), len(self.weight_VD))
        for v in range(0, columns, vocab):
            for c in range(0, rows, tokens):
                yield slice(c, min(c + tokens, rows)), slice(v, min(v + vocab, columns))

    def product(self, s: slice, v: slice) -> torch.Tensor:
        """Return `[C, U]` in the weight's dtype; times 1 / temperature these are the logits."""
        return self.hidden_ND[s] @ self.weight_VD[v].t()

    def products(self) -> Iterator[Product]:
        """Yield the products of all tiles, each computed when it is its turn."""
        for s, v in self.tiles():
            yield s, v, self.product(s, v)

    def statistics(
        self,
        ids_NK: torch.Tensor,
        with_entropy: bool,
        best: RunningTopK | None = None,
        start: int = 0,
        kept: list[Product] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the logits' maxima `[N]`, and `[2 + K, N]` fp32 of them.

        That is: sums of exp, of exp * logit, both relative to the maxima, and the logits of
        `ids_NK`, 0 where another rank has them. best: takes the K largest logits on the way;
        start: id of the first column; kept: takes all products, for `add_gradients`.
        """
        stats = ids_NK.new_zeros(2 + ids_NK.shape[1], len(ids_NK), dtype=torch.float32)
        max_N = torch.full_like(stats[0], -torch.inf)
        for s, v, tile_CU in self.products():
            stats[2:, s] += tile_ops.found(tile_CU, self.inv_temperature, ids_NK[s] - v.start).t()
            if best is not None:
                logits_CU = tile_ops.scaled(tile_CU, self.inv_temperature)
                best.add(logits_CU, s, start + v.start)
            part = tile_ops.statistics(tile_CU, self.inv_temperature, with_entropy)
            merge(part, max_N[s], stats[0, s], stats[1, s])
            if kept is not None:
                kept.append((s, v, tile_CU))
        return max_N, stats

    def add_gradients(
        self,
        ids_NK: torch.Tensor,
        logz_N: torch.Tensor,
        dids_NK: torch.Tensor,
        entropy: EntropyGradient | None,
        dhidden_ND: torch.Tensor,
        dweight_VD: torch.Tensor,
        kept: list[Product] | None = None,
    ) -> None:
        """Add to both gradients, fp32, those of sum(dids * log-prob of ids).

        kept: all products, which become their gradient in place on GPUs; else computed anew.
        """
        for s, v, tile_CU in self.products() if kept is None else kept:
            part = None if entropy is None else EntropyGradient(*(x[s] for x in entropy))
            dtile_CU = tile_ops.gradient(
                tile_CU, self.inv_temperature, ids_NK[s] - v.start, logz_N[s], dids_NK[s], part
            )
            add_product(dhidden_ND[s], dtile_CU, self.weight_VD[v])
            add_product(dweight_VD[v], dtile_CU.t(), self.hidden_ND[s])


def merge(
    part: tile_ops.Statistics, max_C: torch.Tensor, sum_C: torch.Tensor, weighted_C: torch.Tensor
) -> None:
    """Add a tile's statistics to those of the row's earlier tiles, in place."""
    new_max_C = torch.maximum(max_C, part.max)
    older_C, newer_C = (max_C - new_max_C).exp_(), (part.max - new_max_C).exp_()
    max_C.copy_(new_max_C)
    sum_C.mul_(older_C).addcmul_(part.sum, newer_C)
    if part.weighted is not None:
        weighted_C.mul_(older_C).addcmul_(part.weighted, newer_C)


def add_product(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """Add a @ b to `total` in place, which is fp32 whatever the product's dtype."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    elif tile_ops.is_fused(total) and _HAS_OUT_DTYPE:  # summed in fp32 by the product itself
        torch.ops.iwopd.add_product_(total, a, b)
    else:
        total += a @ b
