"""What torch.save writes for one plain tensor, as the bytes around its data, so data can stream.

A distributed checkpoint holds each chunk as such a blob: a zip archive whose `data/0` is the raw
tensor. Its bytes depend on shape and dtype only, since checksums are left out (torch never reads
them; the manifest has its own).
"""

from __future__ import annotations

import functools
import io
import math
from dataclasses import dataclass
from typing import Any

import torch

ALIGN = 64
_LARGE = 2**20


@dataclass(frozen=True)
class Envelope:
    """The bytes before and after the data."""

    before: bytes
    after: bytes

    def length(self, nbytes: int) -> int:
        return len(self.before) + nbytes + len(self.after)


class _Parts:
    """A file that keeps what is written to it in parts, and of large ones only their size."""

    def __init__(self) -> None:
        self.parts: list[bytes | int] = []

    def write(self, part: memoryview) -> int:
        self.parts.append(bytes(part) if len(part) < _LARGE else len(part))
        return len(part)

    def flush(self) -> None:
        """torch.save calls it."""


@functools.cache
def envelope(shape: tuple[int, ...], dtype: torch.dtype, checksums: bool = False) -> Envelope:
    """Of a contiguous CPU tensor; takes no memory of that size, for no page of it is touched."""
    is_large = math.prod(shape) * dtype.itemsize >= _LARGE
    file = _Parts()
    _save((torch.empty if is_large else torch.zeros)(shape, dtype=dtype), file, checksums)
    title = file.parts.index(b"archive/data/0")
    # a record is header, title, padding, data, descriptor
    data = next(
        i - 1
        for i, part in enumerate(file.parts)
        if i > title and isinstance(part, bytes) and part[:4] == b"PK\x07\x08"
    )
    return Envelope(b"".join(file.parts[:data]), b"".join(file.parts[data + 1 :]))


def serialise(thing: Any, checksums: bool = False) -> bytes:
    """torch.save, without checksums unless asked for."""
    buffer = io.BytesIO()
    _save(thing, buffer, checksums)
    return buffer.getvalue()


def _save(thing: Any, file: Any, checksums: bool) -> None:
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(checksums)
    torch.save(thing, file)
    torch.serialization.set_crc32_options(before)


def data_start(blob: memoryview, shape: tuple[int, ...], dtype: torch.dtype) -> int | None:
    """Where the raw data of such a tensor begins; None if torch.load has to read this blob."""
    for checksums in (False, True):
        expected = envelope(shape, dtype, checksums)
        whole = expected.length(math.prod(shape) * dtype.itemsize)
        if len(blob) == whole and blob[: len(expected.before)] == expected.before:
            return len(expected.before)
    return None
