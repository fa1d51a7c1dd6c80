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
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

MAX_ITEMS = 100_000  # of a result; of a larger one only a digest leaves the sandbox
MAX_DIGITS = 200_000  # of a number that goes in or out; Python's own limit is 4300


@contextlib.contextmanager
def long_numbers() -> Iterator[None]:
    """Numbers of up to MAX_DIGITS are read and written while this lasts; also a decorator."""
    before = sys.get_int_max_str_digits()
    sys.set_int_max_str_digits(MAX_DIGITS)
    try:
        yield
    finally:
        sys.set_int_max_str_digits(before)


def encode(value: Any, max_items: int | None = None) -> Any:
    """A value as JSON: containers as [kind, items]; subclasses as what they derive from.

    With `max_items`, a larger one is ["digest", SHA-256], equal for equal values of equal types.
    """
    if max_items is not None and _items(value, max_items) > max_items:
        # format 0 has no back references, so that it depends on nothing but the value
        return ["digest", hashlib.sha256(marshal.dumps(value, 0)).hexdigest()]
    if value is None or type(value) in (bool, int, float, str):
        return value
    for kind, items in (("list", list), ("tuple", tuple), ("set", set), ("frozenset", frozenset)):
        if isinstance(value, items):
            return [kind, [encode(item) for item in items.__iter__(value)]]
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
    for kind in (int, float, str):
        if isinstance(value, kind):
            return kind(value)
    if type(value).__module__ == "numpy" and hasattr(value, "tolist"):
        items = value.tolist()  # a scalar's is a plain number
        return ["array", encode(items)] if isinstance(items, list) else encode(items)
    return ["opaque", type(value).__name__]


def _items(value: Any, enough: int) -> int:
    """Values inside a value; counting stops soon after `enough`."""
    if not isinstance(value, (list, tuple, dict, set, frozenset)):
        return 1
    count = 0
    for item in value:
        count += _items(item, enough - count)
        if count > enough:
            break
    return count


@dataclass(frozen=True)
class Digest:
    """Stands for a large value; equal to that of an equal one."""

    sha256: str


class Opaque:
    """Stands for a value that is no data: not None, and equal to nothing."""


def decode(data: Any) -> Any:
    """What `encode` was given."""
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
        "bytes": bytes.fromhex, "complex": lambda x: complex(*x), "range": lambda x: range(*x),
        "decimal": decimal.Decimal, "fraction": fractions.Fraction, "opaque": lambda _: Opaque(),
        "digest": Digest,
    }  # fmt: skip
    return simple[kind](content)
