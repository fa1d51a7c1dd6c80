"""What Megatron's token dispatchers remember of a forward pass, forgotten once it is combined.

They keep routing and probabilities as attributes until the next forward pass. Under recomputation
the graph of those reaches every layer's recomputed input and its gradient; without it they are E x
13 bytes a token and layer (E experts) that no backward pass reads: autograd keeps what it needs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from iwopd_megatron.runtime.megatron import MoELayer


def forget_dispatched(chunk: torch.nn.Module) -> None:
    """Let every token dispatcher of a chunk, of whatever kind, forget a pass that is combined."""
    for module in chunk.modules():
        if isinstance(module, MoELayer):
            dispatcher = module.token_dispatcher
            dispatcher.combine_postprocess = _forgetting(dispatcher)


def _forgetting(dispatcher: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return the last step of a dispatcher's forward pass, also where it is recomputed."""
    combine, lasting = dispatcher.combine_postprocess, list(_tensors(dispatcher))

    def combine_and_forget(hidden: torch.Tensor) -> torch.Tensor:
        out = combine(hidden)
        for holder, name in list(_tensors(dispatcher)):
            if (holder, name) not in lasting:
                setattr(holder, name, None)
        return out

    return combine_and_forget


def _tensors(dispatcher: Any) -> Iterator[tuple[Any, str]]:
    """Yield (object, public attribute) of the tensors that a dispatcher and its manager hold.

    Buffers that outlive a pass, of zero-copy transports, are private attributes.
    """
    for holder in (dispatcher, getattr(dispatcher, "_comm_manager", None)):
        for name, value in vars(holder).items() if holder is not None else ():
            if isinstance(value, torch.Tensor) and not name.startswith("_"):
                yield holder, name
