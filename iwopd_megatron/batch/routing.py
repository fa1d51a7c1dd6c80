"""MoE routing replay: a sample is trained through the experts that wrote it.

The engine's top-k experts take the place of those the trainer's routers would choose; their weights
are still the softmax of the trainer's own router logits, so that gradients reach the router.
Without it rounding alone makes engine and trainer disagree on some experts (arXiv 2510.11370).
Shapes: T tokens of this context-parallel rank, K experts of a token.
"""

from __future__ import annotations

from collections import deque
from functools import partial

import numpy
import torch

from iwopd_megatron.batch.trajectory import Trajectory
from iwopd_megatron.runtime import device
from iwopd_megatron.runtime.megatron import (
    RouterReplay,
    RouterReplayAction,
    TopKRouter,
    is_checkpointing,
)
from iwopd_megatron.runtime.parallel import Axis

Waiting = deque[torch.Tensor | None]


class RoutingReplay:
    """Hooks that make one model's routers choose the experts given with each micro-batch.

    Through Megatron's `RouterReplay` of every router, not its functions over all routers of the
    process: the teacher's are among those, and they take the latest micro-batch for every
    recomputed one, which under pipeline schedules it is not.
    """

    def __init__(self, chunks: list[torch.nn.Module]):
        self._routes: torch.Tensor | None = None
        self._waiting: list[Waiting] = []
        for chunk in chunks:
            for module in chunk.modules():
                if isinstance(module, TopKRouter):
                    module.router_replay = RouterReplay()
                    self._waiting.append(deque())
                    choose = partial(self._choose, waiting=self._waiting[-1])
                    module.register_forward_pre_hook(choose)
                    module.register_forward_hook(_forget)

    def restart(self) -> None:
        """Forget the routes of all forward passes; call before a schedule, and after it."""
        self._routes = None
        for waiting in self._waiting:
            waiting.clear()

    def follow(self, experts: torch.Tensor | None) -> None:
        """Replay these `[layers, T / tp, K]` in the next forward pass of a chunk; None: nothing."""
        self._routes = None if experts is None else experts.to(device.current_device())

    def _choose(self, router: TopKRouter, _inputs: tuple, waiting: Waiting) -> None:
        """Set a router's experts before it runs; recomputation keeps the order of forwards."""
        if is_checkpointing() and torch.is_grad_enabled():
            routes = waiting.popleft()
        else:
            routes = self._routes
            if is_checkpointing():
                waiting.append(routes)
        replay = router.router_replay
        if routes is None:
            replay.clear_router_replay_action()
            return
        replay.set_router_replay_action(RouterReplayAction.REPLAY_FORWARD)
        # Not set_target_indices(): its list of past targets is emptied by no forward pass.
        replay.target_topk_idx = routes[router.layer_number - 1].long()


def _forget(router: TopKRouter, _inputs: tuple, _output: tuple) -> None:
    """Let go of a router's experts once it has chosen them."""
    router.router_replay.target_topk_idx = None


def cut_routes(
    samples: list[Trajectory], lengths: list[int], index: torch.Tensor, tp: Axis
) -> torch.Tensor | None:
    """Return routes `[layers, T / tp, K]` of a packed micro-batch for this rank's routers, on host.

    lengths: of the packed sequences with their padding, a last one of padding included; index:
    this context-parallel rank's tokens. Padding takes the routes of real tokens, which balances
    experts as those do. None if there is no sample, or one without routes.
    """
    routes = [sample.experts for sample in samples if sample.experts is not None]
    if not routes or len(routes) < len(samples):
        return None
    shape = routes[0].shape[1:]
    parts = [
        numpy.resize(experts, (length, *shape))
        for experts, length in zip([*routes, routes[0]], lengths, strict=False)
    ]
    own = index.view(tp.size, -1)[tp.rank].numpy()  # sequence parallelism cuts contiguously
    return torch.from_numpy(numpy.concatenate(parts)[own].swapaxes(0, 1).copy())
