"""How many tokens every expert of a model gets while it trains.

A forward hook on each of Megatron's routers adds up the routing map that the router returns anyway:
the experts of real tokens, wherever pipeline, tensor, context and data parallelism have put them.
Padding is left out, and so are the second runs of recomputation.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from iwopd_megatron.runtime import device
from iwopd_megatron.runtime.megatron import TopKRouter, is_checkpointing


class RouterLoad:
    """Counts, by layer and expert, of the tokens that one model's routers send on this rank."""

    def __init__(self, chunks: list[torch.nn.Module], layers: int, experts: int):
        self.tokens = torch.zeros(layers, experts, device=device.current_device())
        self._is_real = torch.zeros(0, dtype=torch.bool)  # of no micro-batch yet
        self._is_counting = False
        for chunk in chunks:
            for module in chunk.modules():
                if isinstance(module, TopKRouter):
                    module.register_forward_hook(self._count)

    @contextlib.contextmanager
    def counting(self) -> Iterator[None]:
        """Count anew what runs inside; afterwards `tokens` `[layers, experts]` has the counts."""
        self.tokens.zero_()
        self._is_counting = True
        try:
            yield
        finally:
            self._is_counting = False

    def follow(self, is_real_T: torch.Tensor) -> None:
        """Note which tokens `[T / tp]` of a chunk's next forward pass are no padding."""
        self._is_real = is_real_T

    def forget(self) -> None:
        """Let go of the last micro-batch's tokens; call after a schedule."""
        self._is_real = self._is_real.new_zeros(0)

    def _count(self, router: TopKRouter, _inputs: tuple, output: tuple) -> None:
        is_second_run = is_checkpointing() and torch.is_grad_enabled()
        if self._is_counting and not is_second_run:
            map_TE = output[1] & self._is_real[:, None]
            self.tokens[router.layer_number - 1] += map_TE.sum(0)
