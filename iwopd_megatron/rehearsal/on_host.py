"""Which tensors are in the host's memory, where a GPU's are on a GPU: said by code that copies."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode

from iwopd_megatron.rehearsal.ledger import Ledger
from iwopd_megatron.rehearsal.memoryless import is_hollow, tensors_in
from iwopd_megatron.runtime import device

HOST = "host"  # a kind of bytes


class _Host(TorchFunctionMode):
    """Counts as the host's what is made with device="cpu", what is copied there, and from those.

    Megatron names the host so, and the GPU by `torch.cuda.current_device()`, whose stand-in returns
    no text.
    """

    def __init__(self, ledger: Ledger):
        super().__init__()
        self.ledger = ledger

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.Tensor.cpu:
            return self.copied(args[0], HOST)
        where = kwargs.get("device")
        given = [x for x in tensors_in(args) if is_hollow(x)]
        if isinstance(where, str) and where == "cpu" or any(map(self._is_here, given)):
            with self.ledger.counting_as(HOST):
                return func(*args, **kwargs)
        return func(*args, **kwargs)

    def copied(self, tensor: torch.Tensor, kind: str) -> torch.Tensor:
        """Return a copy of a tensor that is elsewhere, and the tensor itself if it is not."""
        if not is_hollow(tensor) or self._is_here(tensor) == (kind == HOST):
            return tensor
        with self.ledger.counting_as(kind):
            return torch.empty_like(tensor)

    def _is_here(self, tensor: torch.Tensor) -> bool:
        return self.ledger.kind_of(tensor) == HOST


@contextlib.contextmanager
def told_apart(ledger: Ledger) -> Iterator[None]:
    """Count the host's tensors apart from a GPU's, whose kind is the ledger's own."""
    if not device.is_rehearsed():
        yield
        return
    mode, kind = _Host(ledger), ledger.kind
    with mode, mock.patch.object(torch.Tensor, "cuda", lambda x: mode.copied(x, kind)):
        yield
