"""What a rehearsal finds of one role."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from iwopd_megatron.config.models import Layout
from iwopd_megatron.rehearsal.on_host import HOST
from iwopd_megatron.rehearsal.slices import Slices

GIB = 2**30


@dataclass
class RoleReport:
    """What was found of one role. Bytes at the busiest rank, of `peak_rank`."""

    role: str
    world: int
    computing: str  # the phase that computes most
    slices: Slices
    rehearsed: list[int] = field(default_factory=list)  # ranks
    phases: dict[str, dict[str, float]] = field(default_factory=dict)  # bytes at the peak, by kind
    peak_rank: int = 0
    peak: float = 0.0
    planned: float = 0.0
    planned_push: float = 0.0  # bytes while new weights are pushed
    push_seconds: tuple[float, float] | None = None  # and as planned
    hot: dict[float, float] = field(default_factory=dict)  # peak with an expert rank that hot
    kept: float = 0.0
    loaded_by: list[Layout] = field(default_factory=list)  # layouts that load its checkpoint
    calls: int = 0  # of all ranks' programs
    volumes: dict[str, dict[str, tuple[float, float]]] = field(default_factory=dict)
    moved: dict[str, tuple[float, float]] = field(default_factory=dict)  # by axis, and planned
    seconds: float = 0.0  # of a micro-batch in the computing phase
    costs: Counter[str] = field(default_factory=Counter)  # seconds of that phase
    microbatches: int = 1
    findings: list[str] = field(default_factory=list)


def on_gpu(kinds: dict[str, float]) -> float:
    """Return bytes of all kinds but the host's."""
    return sum(size for kind, size in kinds.items() if kind != HOST)
