"""Values on their way into the sandbox and out of it, as JSON that keeps their types.

Imports nothing but the standard library, for sandbox_child.py uses it without the package.
"""

from __future__ import annotations

import collections
import contextlib
import decimal
import fractions
import hashlib
import marshal
import sys
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

MAX_ITEMS = 100_000  # of a result; of a larger one only a digest leaves the sandbox
MAX_DIGITS = 200_000  # of a number that goes in or out; Python's own limit is 4300

CONTAINERS: tuple[tuple[str, type[Collection[Any]]], ...] = (
    ("list", list),
    ("tuple", tuple),
    ("set", set),
    ("frozenset", frozenset),
)


@contextlib.contextmanager
def long_numbers() -> Iterator[None]:
    """Let integers of up to MAX_DIGITS be read and written meanwhile; also a decorator."""
    before = sys.get_int_max_str_digits()
    sys.set_int_max_str_digits(MAX_DIGITS)
    try:
        yield
    finally:
        sys.set_int_max_str_digits(before)


def encode(value: Any, max_items: int | None = None) -> Any:
    """Return a value as JSON: containers as [kind, items], subclasses as what they derive from.

    With `max_items`, a larger one is ["digest", SHA-256], equal for equal values of equal types.
    """
    if max_items is not None and _items(value, max_items) > max_items:
        # format 0 has no back references, so that it depends on nothing but the value
        return ["digest", hashlib.sha256(marshal.dumps(value, 0)).hexdigest()]
    if value is None or type(value) in (bool, int, float, str):
        return value
    for kind, container in CONTAINERS:
        if isinstance(value, container):  # its own __iter__, not that of a subclass
            return [kind, [encode(item) for item in container.__iter__(value)]]
    if isinstance(value, collections.deque):
        return ["deque", [encode(item) for item in value]]
    if isinstance(value, dict):
        return ["dict", [[encode(key), encode(item)] for key, item in dict.items(value)]]
    if isinstance(value, (bytes, bytearray)):
        return ["bytes", value.hex()]
    if isinstance(value, complex):
        return ["complex", [value.real, value.imag]]
    if isinstance(value, range):
        return ["range", [value.start, value.stop, value.step]]
    if isinstance(value, (decimal.Decimal, fractions.Fraction)):
        return [type(value).__name__.lower(), str(value)]
    for scalar in (int, float, str):
        if isinstance(value, scalar):
            return scalar(value)
    if type(value).__module__ == "numpy" and hasattr(value, "tolist"):
        items = value.tolist()  # a scalar's is a plain number
        return ["array", encode(items)] if isinstance(items, list) else encode(items)
    return ["opaque", type(value).__name__]


def _items(value: Any, enough: int) -> int:
    """Count the values inside a value; stop soon after `enough`."""
    if not isinstance(value, (list, tuple, dict, set, frozenset)):
        return 1
    count = 0
    for item in value:
        count += _items(item, enough - count)
        if count > enough:
            break
    return count


@dataclass(frozen=True)
class ValueDigest:
    """A stand-in for a large value; equal to that of an equal one."""

    sha256: str


class Opaque:
    """A stand-in for a value that is no data: not None, and equal to nothing else."""


def decode(data: Any) -> Any:
    """Return what `encode` was given, or a stand-in for it."""
    if not isinstance(data, list):
        return data
    kind, content = data
    if kind == "dict":
        return {decode(key): decode(item) for key, item in content}
    if kind in ("list", "tuple", "set", "frozenset", "deque"):
        make = {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset}
        return make.get(kind, collections.deque)(decode(item) for item in content)
    if kind == "array":
        import numpy

        return numpy.array(decode(content))
    simple = {
        "bytes": bytes.fromhex,
        "complex": lambda x: complex(*x),
        "range": lambda x: range(*x),
        "decimal": decimal.Decimal,
        "fraction": fractions.Fraction,
        "opaque": lambda _: Opaque(),
        "digest": ValueDigest,
    }
    return simple[kind](content)
