"""Seconds of a GPU's operations by their own arithmetic and bytes: a second opinion on the plan.

An operation takes the longer of its FLOP at the rate its kind reaches and its bytes through memory
(Williams et al., CACM 52(4), 2009), and LAUNCH besides. Views and bookkeeping cost nothing.
"""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass, field

import torch

from iwopd_megatron.plan.hardware import Gpu, Rates
from iwopd_megatron.rehearsal.memoryless import Operation, is_hollow

# Seconds of an operation of the host: PyTorch's eager dispatch and one kernel's launch.
LAUNCH = 5e-6

aten = torch.ops.aten
_NOTHING = {"detach", "lift_fresh", "_local_scalar_dense", "empty", "new_empty", "empty_like",
            "set_", "resize_", "alias", "_reshape_alias", "_unsafe_view"}  # fmt: skip
_ATTENTION = ("_scaled_dot_product",)
_GROUPED = ("_grouped_mm",)


@dataclass
class Costs:
    """Seconds by phase and operation; an observer of `Watched`."""

    gpu: Gpu
    rates: Rates
    name: str = "other"  # of the phase that runs
    phases: dict[str, dict[str, float]] = field(
        default_factory=lambda: defaultdict(lambda: defaultdict(float))
    )

    def see(self, operation: Operation, inputs: list[torch.Tensor], outputs: list[torch.Tensor]):
        """Add an operation's seconds."""
        name = operation._schema.name.split("::")[1]
        if (
            operation.namespace == "prim"
            or name in _NOTHING
            or _is_view(operation)
            or not _is_on_gpu(inputs, outputs)
        ):
            return
        self.phases[self.name][name] += self._seconds(name, inputs, outputs) + LAUNCH

    def _seconds(self, name: str, inputs: list[torch.Tensor], outputs: list[torch.Tensor]) -> float:
        moved = sum(x.nbytes for x in inputs) + sum(x.nbytes for x in outputs)
        memory = moved / (self.gpu.hbm * self.rates.hbm)
        return max(memory, self._flop(name, inputs, outputs) / (self.gpu.tflops * self._rate(name)))

    def _rate(self, name: str) -> float:
        if name.startswith(_ATTENTION):
            return self.rates.attention
        return self.rates.grouped_gemm if name.startswith(_GROUPED) else self.rates.gemm

    @staticmethod
    def _flop(name: str, inputs: list[torch.Tensor], outputs: list[torch.Tensor]) -> float:
        """Return multiply-adds times 2: of products and of causal attention, half of a square."""
        if name in ("mm", "bmm", "addmm", "addmm_", "baddbmm", "_grouped_mm", "add_product_"):
            a, b = inputs[-2:] if name.startswith(("add", "badd")) else inputs[:2]
            if name == "_grouped_mm" and a.dim() == b.dim() == 2:  # gradients of weights
                return 2.0 * a.shape[0] * a.shape[1] * b.shape[1]
            return 2.0 * math.prod(a.shape) * b.shape[-1]
        if name.startswith(_ATTENTION):
            is_backward = "backward" in name
            query, key = inputs[is_backward : 2 + is_backward]
            square = query.shape[-2] * key.shape[-2] - query.shape[-2] ** 2 / 2
            product = 2.0 * query.shape[0] * query.shape[1] * square * query.shape[-1]
            return product * (5 if is_backward else 2)
        return 0.0


def _is_view(operation: Operation) -> bool:
    returns = operation._schema.returns
    return bool(returns) and all(
        r.alias_info is not None and not r.alias_info.is_write for r in returns
    )


def _is_on_gpu(inputs: list[torch.Tensor], outputs: list[torch.Tensor]) -> bool:
    """Return whether a GPU would run it: anything without memory, or a large table of numbers."""
    tensors = inputs + outputs
    return any(is_hollow(x) or x.numel() > 4096 for x in tensors)
