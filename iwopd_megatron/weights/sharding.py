"""How whole Hugging Face tensors become one tensor-parallel shard, and shards whole tensors again.

Shapes: D hidden, F ffn, H heads x head size, E local experts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import torch

from iwopd_megatron.hf.config import HfConfig

Tensor = torch.Tensor


class TensorSlice(Protocol):
    """A tensor of a safetensors file whose bytes are read when it is indexed (`get_slice`)."""

    def get_shape(self) -> list[int]:
        """Return the whole tensor's shape."""

    def get_dtype(self) -> str:
        """Return the dtype that indexing gives, as safetensors names it."""

    def __getitem__(self, index: slice | tuple[slice, ...], /) -> Tensor:
        """Read a part."""


Source: TypeAlias = Tensor | TensorSlice
Shard: TypeAlias = Callable[[Sequence[Source], int, int, HfConfig], Tensor]
Unshard: TypeAlias = Callable[[Sequence[Tensor], HfConfig], list[Tensor]]


@dataclass(frozen=True)
class Sharding:
    """One way to cut whole tensors into the shards of a tensor-parallel axis.

    `shard(sources, rank, size, hf)` returns one rank's shard and only slices its sources;
    `unshard(shards, hf)` returns the sources from the shards of all ranks in order.
    """

    shard: Shard
    unshard: Unshard
    is_stack: bool = True  # the whole (rank 0 of 1) is its sources' rows, one after the other


def _shape(source: Source) -> list[int]:
    return list(source.shape) if isinstance(source, Tensor) else source.get_shape()


def _rows(source: Source, rank: int, size: int) -> Tensor:
    step = _shape(source)[0] // size
    return source[rank * step : (rank + 1) * step]


def _columns(source: Source, rank: int, size: int) -> Tensor:
    step = _shape(source)[1] // size
    return source[:, rank * step : (rank + 1) * step]


def _joined(parts: Sequence[Tensor], dim: int = 0) -> Tensor:
    """Return the parts one after the other along a dim; one alone needs no copy."""
    return torch.cat(list(parts), dim) if len(parts) > 1 else parts[0]


def _shard_qkv(sources: Sequence[Source], rank: int, size: int, hf: HfConfig) -> Tensor:
    """Interleave as Megatron does: q, k, v of one key-value group together, [q..q k v] a group."""
    groups, head = hf.num_key_value_heads // size, hf.head_dim
    parts = [_rows(source, rank, size) for source in sources]
    grouped = [part.reshape(groups, -1, head, *part.shape[1:]) for part in parts]
    return torch.cat(grouped, 1).flatten(0, 2)


def _unshard_qkv(shards: Sequence[Tensor], hf: HfConfig) -> list[Tensor]:
    whole = _joined(shards)
    whole = whole.unflatten(0, (hf.num_key_value_heads, -1, hf.head_dim))
    queries = whole.shape[1] - 2
    return [x.flatten(0, 2) for x in whole.split([queries, 1, 1], 1)]


def _shard_gated(sources: Sequence[Source], rank: int, size: int, hf: HfConfig) -> Tensor:
    return torch.cat([_rows(source, rank, size) for source in sources])


def _unshard_gated(shards: Sequence[Tensor], hf: HfConfig) -> list[Tensor]:
    pairs = zip(*(shard.chunk(2) for shard in shards), strict=True)
    return [_joined(halves) for halves in pairs]


def _shard_grouped_gated(sources: Sequence[Source], rank: int, size: int, hf: HfConfig) -> Tensor:
    """[gate, up] of every local expert -> [E, D, 2F / size] stored as [D, E * 2F / size]."""
    experts = [_shard_gated(sources[i : i + 2], rank, size, hf) for i in range(0, len(sources), 2)]
    return torch.stack(experts).transpose(1, 2).reshape(experts[0].shape[1], -1)


def _unshard_grouped_gated(shards: Sequence[Tensor], hf: HfConfig) -> list[Tensor]:
    width = 2 * hf.moe_intermediate_size // len(shards)
    by_rank = [x.reshape(-1, x.shape[0], width).transpose(1, 2) for x in shards]  # [E, width, D]
    by_expert = zip(*by_rank, strict=True)
    return [x for expert in by_expert for x in _unshard_gated(expert, hf)]


def _shard_grouped_down(sources: Sequence[Source], rank: int, size: int, hf: HfConfig) -> Tensor:
    """[D, F] of every local expert -> [E, F / size, D] stored as [E * F / size, D]."""
    return torch.cat([_columns(source, rank, size).t() for source in sources])


def _unshard_grouped_down(shards: Sequence[Tensor], hf: HfConfig) -> list[Tensor]:
    width = hf.moe_intermediate_size // len(shards)
    experts = zip(*(shard.split(width) for shard in shards), strict=True)
    return [torch.cat(parts).t() for parts in experts]


REPLICATED = Sharding(
    lambda sources, rank, size, hf: sources[0][:],
    lambda shards, hf: [shards[0]],
)
ROWS = Sharding(
    lambda sources, rank, size, hf: _rows(sources[0], rank, size),
    lambda shards, hf: [_joined(shards)],
)
COLUMNS = Sharding(
    lambda sources, rank, size, hf: _columns(sources[0], rank, size),
    lambda shards, hf: [_joined(shards, 1)],
)
QKV = Sharding(_shard_qkv, _unshard_qkv, is_stack=False)
GATED = Sharding(_shard_gated, _unshard_gated)
GROUPED_GATED = Sharding(_shard_grouped_gated, _unshard_grouped_gated, is_stack=False)
GROUPED_DOWN = Sharding(_shard_grouped_down, _unshard_grouped_down, is_stack=False)
SHARDINGS = {
    "REPLICATED": REPLICATED,
    "ROWS": ROWS,
    "COLUMNS": COLUMNS,
    "QKV": QKV,
    "GATED": GATED,
    "GROUPED_GATED": GROUPED_GATED,
    "GROUPED_DOWN": GROUPED_DOWN,
}  # by the names that rows of hf/families have
