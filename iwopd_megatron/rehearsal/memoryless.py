"""Tensors without memory: what computes is a shape, what counts, routes or indexes is real.

Under `Memoryless` every floating-point tensor is one of torch's FakeTensors: a model of any size
costs nothing. Integers and booleans stay real, so that lengths, routes and splits are numbers, as
they are in the run, and nothing depends on values that are not there. A number that is read off a
tensor without memory (a norm, whether all is finite) is 1.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any, Protocol
from unittest import mock

import numpy
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
Operation = torch._ops.OpOverload


class Observer(Protocol):
    """Sees every operation, after it ran."""

    def see(self, operation: Operation, inputs: list[torch.Tensor], outputs: list[torch.Tensor]):
        """Take note of an operation, its tensors and its results."""


class Communicator(Protocol):
    """Runs c10d operations."""

    def run(self, operation: Operation, arguments: Sequence[Any]) -> Any:
        """Do, or seem to do, what the operation does; return what it returns."""


class Watched(TorchDispatchMode):
    """Shows every operation to observers, and lets them run as they are."""

    def __init__(self, observers: Sequence[Observer], communicator: Communicator | None = None):
        super().__init__()
        self.observers, self.communicator = observers, communicator

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.namespace == "c10d" and self.communicator is not None:
            return self.communicator.run(func, args)
        inputs = tensors_in((args, kwargs))
        result = self.compute(func, inputs, args, kwargs)
        if not self.observers:
            return result
        outputs = tensors_in(result)
        for observer in self.observers:
            observer.see(func, inputs, outputs)
        return result

    def compute(
        self, func: Operation, inputs: list[torch.Tensor], args: tuple, kwargs: dict[str, Any]
    ) -> Any:
        """Return the operation's result."""
        return func(*args, **kwargs)


class Memoryless(Watched):
    """The same, on tensors without memory."""

    def __init__(self, observers: Sequence[Observer], communicator: Communicator | None = None):
        super().__init__(observers, communicator)
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)

    def __enter__(self):
        self._patches = contextlib.ExitStack()
        # torch cannot swap FakeTensors that are referred to, and reads one number after the other
        self._patches.enter_context(mock.patch.object(torch.nn.Module, "_apply", _stay))
        self._patches.enter_context(mock.patch.object(FakeTensor, "tolist", _ones))
        return super().__enter__()

    def __exit__(self, *failure):
        self._patches.close()
        return super().__exit__(*failure)

    def compute(self, func, inputs, args, kwargs):
        if any(isinstance(x, FakeTensor) for x in inputs):
            rule = _BY_VALUE.get(func)
            if rule is not None:
                return rule(*args, **kwargs)
            with self.fake:
                return func(*args, **kwargs)
        if _is_floating(func, inputs, kwargs):
            with self.fake:
                return func(*args, **kwargs)
        return func(*args, **kwargs)


class Shapes(Memoryless):
    """The same on meta tensors, ten times as fast: for code that asks no tensor where it is."""

    def __enter__(self):
        self._lists = _Lists()
        self._lists.__enter__()
        return super().__enter__()

    def __exit__(self, *failure):
        super().__exit__(*failure)
        return self._lists.__exit__(*failure)

    def compute(self, func, inputs, args, kwargs):
        if not (any(x.is_meta for x in inputs) or _is_floating(func, inputs, kwargs)):
            return func(*args, **kwargs)
        rule = _BY_VALUE.get(func)
        if rule is not None:
            return rule(*args, **kwargs)
        args, kwargs = _as_meta(args), _as_meta(kwargs)
        if "device" in kwargs or not inputs:
            kwargs = kwargs | {"device": torch.device("meta")}
        return func(*args, **kwargs)


class _Lists(TorchFunctionMode):
    """Reads ones off tensors that have no content."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.Tensor.tolist and args[0].is_meta:
            return _ones(args[0])
        return func(*args, **(kwargs or {}))


def _ones(tensor: torch.Tensor) -> Any:
    """Return what `Tensor.tolist` does, all ones."""
    return numpy.ones(tuple(tensor.shape)).tolist()


def _as_meta(value: Any) -> Any:
    """Return nested tuples, lists and dicts with meta tensors in the place of real ones."""
    if isinstance(value, torch.Tensor):
        return value if value.is_meta else torch.empty_like(value, device="meta")
    if isinstance(value, dict):
        return {key: _as_meta(part) for key, part in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(_as_meta(part) for part in value)
    return value


def is_hollow(tensor: torch.Tensor) -> bool:
    """Return whether a tensor has no content."""
    return tensor.is_meta or isinstance(tensor, FakeTensor)


def _stay(module: torch.nn.Module, function: Callable, recurse: bool = True) -> torch.nn.Module:
    """Leave a module's tensors where and as they are; they were made so. TypeError if not."""
    for tensor in [*module.parameters(), *module.buffers()]:
        if tensor.is_floating_point() and function(tensor).dtype != tensor.dtype:
            raise TypeError(f"a {tensor.dtype} of {type(module).__name__} would be converted")
    return module


def tensors_in(value: Any) -> list[torch.Tensor]:
    """Return the tensors of nested tuples, lists and dicts, in order."""
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, (tuple, list)):
        return []
    return [x for part in value for x in tensors_in(part)]


def _is_floating(func: Operation, inputs: list[torch.Tensor], kwargs: dict[str, Any]) -> bool:
    """Return whether an operation on real tensors makes a floating-point one."""
    dtype = kwargs.get("dtype")
    if dtype is not None:
        return dtype.is_floating_point
    if inputs:  # real numbers on the host, such as a batch's own
        return False
    return any(kind in func._schema.name for kind in ("empty", "rand", "zeros", "ones", "full"))


def _number(tensor: torch.Tensor) -> Any:
    """Read a number that is not there: 1, or true."""
    return True if tensor.dtype == torch.bool else torch.ones((), dtype=tensor.dtype).item()


def _masked_select(tensor: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Return as many elements as a real mask selects."""
    count = int(torch.broadcast_to(mask, torch.broadcast_shapes(mask.shape, tensor.shape)).sum())
    return tensor.new_empty(count)


def _index(tensor: torch.Tensor, indices: Sequence[torch.Tensor | None]) -> torch.Tensor:
    """Return `tensor[indices]`, of which masks are real."""
    return aten.index.Tensor(tensor, _as_places(indices))


def _index_put(tensor: torch.Tensor, indices, values, accumulate=False) -> torch.Tensor:
    return aten.index_put_.default(tensor, _as_places(indices), values, accumulate)


def _grouped_mm(a: torch.Tensor, b: torch.Tensor, offs: torch.Tensor, *_, **__) -> torch.Tensor:
    """Return `[T, out]`, or of two matrices `[E, in, out]`; torch's own rule is of bf16 alone.

    a: `[T, in]` with b: `[E, in, out]`; or `[in, T]` with `[T, out]`.
    """
    if b.dim() == 3:
        return a.new_empty(a.shape[0], b.shape[2])
    return a.new_empty(len(offs), a.shape[0], b.shape[1])


def _as_places(indices: Sequence[torch.Tensor | None]) -> list[torch.Tensor | None]:
    places: list[torch.Tensor | None] = []
    for index in indices:
        if index is not None and index.dtype == torch.bool:
            places += index.nonzero().unbind(1)
        else:
            places.append(index)
    return places


_BY_VALUE: dict[Operation, Callable[..., Any]] = {
    aten._local_scalar_dense.default: _number,
    aten.masked_select.default: _masked_select,
    aten._grouped_mm.default: _grouped_mm,
    aten.index.Tensor: _index,
    aten.index_put_.default: _index_put,
}
