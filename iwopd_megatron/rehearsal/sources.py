"""Hugging Face tensors of which only shapes exist: what is read of each is noted."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache

import torch

from iwopd_megatron.hf.config import HfConfig
from iwopd_megatron.hf.shapes import hf_names, hf_shape

Region = tuple[tuple[int, int], ...]  # (first, end) of every axis


@lru_cache(maxsize=4)
def shapes_of(hf: HfConfig) -> Mapping[str, tuple[int, ...]]:
    """Return the shapes of all tensors that a config implies, counted once for all ranks."""
    return {name: hf_shape(name, hf) for name in hf_names(hf)}


@dataclass(frozen=True)
class HollowTensor:
    """A whole tensor; indexing it notes the part and returns one without content."""

    name: str
    shape: tuple[int, ...]
    reads: list[tuple[str, Region]]
    dtype: torch.dtype

    def get_shape(self) -> list[int]:
        """Return the whole tensor's shape."""
        return list(self.shape)

    def get_dtype(self) -> str:
        """Return its dtype, as safetensors names it."""
        return {torch.bfloat16: "BF16", torch.float32: "F32"}[self.dtype]

    def __getitem__(self, index: slice | tuple[slice, ...]) -> torch.Tensor:
        """Note a read; return a tensor of its shape."""
        axes = index if isinstance(index, tuple) else (index,)
        full = [*axes, *[slice(None)] * (len(self.shape) - len(axes))]
        region = tuple(s.indices(n)[:2] for s, n in zip(full, self.shape, strict=True))
        self.reads.append((self.name, region))
        return torch.empty([end - first for first, end in region], dtype=self.dtype)


class HollowFolder(Mapping[str, HollowTensor]):
    """The tensors that a config implies; `reads` has every part that was read, in order."""

    def __init__(self, hf: HfConfig, dtype: torch.dtype = torch.bfloat16):
        self.dtype = dtype
        self.shapes = shapes_of(hf)
        self.reads: list[tuple[str, Region]] = []

    def __getitem__(self, name: str) -> HollowTensor:
        return HollowTensor(name, self.shapes[name], self.reads, self.dtype)

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)
