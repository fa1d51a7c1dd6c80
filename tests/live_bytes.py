"""Bytes of tensors that operations made and that are still alive, with where each was made."""

import sys
import weakref
from typing import NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_OURS = "iwopd_megatron", "megatron"


class Made(NamedTuple):
    """A storage that an operation made."""

    size: int  # bytes
    shape: tuple[int, ...]
    dtype: torch.dtype
    operation: str
    line: str  # the innermost one of this project or of Megatron


class LiveBytes(TorchDispatchMode):
    """Storages made inside and alive, `peak`: the most bytes of them at once."""

    def __init__(self):
        super().__init__()
        self.live, self.peak = 0, 0
        self.made: dict[int, Made] = {}
        self.at_peak: list[Made] = []
        self.wants_peak = False  # whether `at_peak` is kept, which is slow

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        given = {id_of(t) for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if not isinstance(tensor, torch.Tensor):
                continue
            key = id_of(tensor)
            if key not in given and key not in self.made:
                storage = tensor.untyped_storage()
                size = storage.nbytes()
                self.made[key] = Made(
                    size, tuple(tensor.shape), tensor.dtype, str(function), _line()
                )
                self.live += size
                if self.live > self.peak:
                    self.peak = self.live
                    if self.wants_peak:
                        self.at_peak = list(self.made.values())
                weakref.finalize(storage, self._forget, key, size)
        return out

    def _forget(self, key, size):
        del self.made[key]
        self.live -= size


def id_of(tensor):
    return tensor.untyped_storage()._cdata


def _line() -> str:
    frame, found = sys._getframe(2), "?"
    while frame is not None:
        name = frame.f_globals.get("__name__", "")
        if name.partition(".")[0] in _OURS and not name.endswith("stand_ins"):
            return f"{name}:{frame.f_lineno}"
        frame = frame.f_back
    return found
