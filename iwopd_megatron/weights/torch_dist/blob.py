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
from typing import IO

import torch
from typing_extensions import Buffer

from iwopd_megatron.weights.torch_dist.torch_internals import DESCRIPTOR, FIRST_DATA

_LARGE = 2**20


@dataclass(frozen=True)
class Envelope:
    """The bytes of a blob before and after its data."""

    before: bytes
    after: bytes

    def length(self, nbytes: int) -> int:
        """Return the whole blob's length around `nbytes` of data."""
        return len(self.before) + nbytes + len(self.after)


class _Parts(io.BytesIO):
    """A file that keeps what is written to it part by part; of a large part, the data, nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.parts: list[bytes] = []

    def write(self, part: Buffer, /) -> int:
        """Keep a part."""
        view = memoryview(part)
        self.parts.append(bytes(view) if view.nbytes < _LARGE else b"")
        return view.nbytes


@functools.cache
def envelope(shape: tuple[int, ...], dtype: torch.dtype, checksums: bool = False) -> Envelope:
    """Return the envelope of a contiguous CPU tensor.

    Takes no memory of the tensor's size, for no page of it is touched.
    """
    is_large = math.prod(shape) * dtype.itemsize >= _LARGE
    file = _Parts()
    _save((torch.empty if is_large else torch.zeros)(shape, dtype=dtype), file, checksums)
    parts = file.parts
    title = parts.index(FIRST_DATA)
    # a record is header, title, padding, data, descriptor
    after = next(i for i in range(title + 1, len(parts)) if parts[i].startswith(DESCRIPTOR))
    return Envelope(b"".join(parts[: after - 1]), b"".join(parts[after:]))


def serialise(thing: object, checksums: bool = False) -> bytes:
    """Return what torch.save writes, without checksums unless asked for."""
    buffer = io.BytesIO()
    _save(thing, buffer, checksums)
    return buffer.getvalue()


def _save(thing: object, file: IO[bytes], checksums: bool) -> None:
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(checksums)
    torch.save(thing, file)
    torch.serialization.set_crc32_options(before)


def data_start(blob: memoryview, shape: tuple[int, ...], dtype: torch.dtype) -> int | None:
    """Return where such a tensor's data begins in a blob; None if torch.load has to read it."""
    for checksums in (False, True):
        expected = envelope(shape, dtype, checksums)
        whole = expected.length(math.prod(shape) * dtype.itemsize)
        if len(blob) == whole and blob[: len(expected.before)] == expected.before:
            return len(expected.before)
    return None
