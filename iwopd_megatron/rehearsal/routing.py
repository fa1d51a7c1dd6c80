"""Routing as a number: every expert gets its share of the tokens, or one rank's get more."""

from __future__ import annotations

import torch

from iwopd_megatron.runtime.megatron import TopKRouter
from iwopd_megatron.runtime.parallel import Parallel


class Routing:
    """Hooks that give every router of a model a routing map; works in a real run too."""

    def __init__(self, chunks: list[torch.nn.Module], parallel: Parallel, hot: float = 1.0):
        """hot: tokens of the first expert-parallel rank's experts over the mean, at most ep."""
        self.ranks = parallel.ep.size
        self.hot = min(hot, float(self.ranks))
        self._hooks = [
            module.register_forward_hook(self._route)
            for chunk in chunks
            for module in chunk.modules()
            if isinstance(module, TopKRouter)
        ]

    def remove(self) -> None:
        """Let the routers route again."""
        for hook in self._hooks:
            hook.remove()

    def _route(self, router: TopKRouter, _inputs: tuple, output: tuple) -> tuple:
        probs = output[0]
        return probs, *(self.map(probs.shape[0], probs.shape[1], router.topk),), *output[2:]

    def map(self, tokens: int, experts: int, topk: int) -> torch.Tensor:
        """Return a routing map `[tokens, experts]` bool with `topk` experts a token."""
        counts = expert_counts(tokens, experts, topk, self.ranks, self.hot)
        expert = torch.arange(experts).repeat_interleave(torch.tensor(counts))
        token = torch.arange(tokens * topk) % tokens
        chosen = torch.zeros(tokens, experts, dtype=torch.bool)
        chosen[token, expert] = True
        return chosen


def expert_counts(tokens: int, experts: int, topk: int, ranks: int, hot: float) -> list[int]:
    """Return tokens of every expert: `hot` times the mean for the first rank's, the rest evenly.

    No expert gets a token twice, so a count is at most `tokens`.
    """
    total, own = tokens * topk, experts // ranks
    first = _evenly(min(round(total / ranks * hot), own * tokens, total), own)
    rest = _evenly(total - sum(first), experts - own) if experts > own else []
    return first + rest


def _evenly(total: int, parts: int) -> list[int]:
    return [total // parts + (i < total % parts) for i in range(parts)]
