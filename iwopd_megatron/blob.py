"""What torch.save writes for one plain tensor, as the bytes around its data, so data can stream.

A distributed checkpoint holds each chunk as such a blob: a zip archive whose `data/0` is the raw
tensor. Its bytes depend on shape and dtype only, since checksums are left out (torch never reads
them; the manifest has its own).
"""

from __future__ import annotations

import functools
import io
import math
import zipfile
from dataclasses import dataclass
from typing import Any

import torch

ALIGN = 64


@dataclass(frozen=True)
class Envelope:
    """The bytes before and after the data."""

    before: bytes
    after: bytes

    def length(self, nbytes: int) -> int:
        return len(self.before) + nbytes + len(self.after)


@functools.cache
def envelope(shape: tuple[int, ...], dtype: torch.dtype, checksums: bool = False) -> Envelope:
    """Of a contiguous CPU tensor. Costs that tensor's memory, once a shape."""
    blob = serialise(torch.empty(shape, dtype=dtype), checksums)
    with zipfile.ZipFile(io.BytesIO(blob)) as archive:
        record = next(x for x in archive.infolist() if x.filename.endswith("/data/0"))
    title = blob.index(record.filename.encode(), record.header_offset)
    extra = int.from_bytes(blob[title - 2 : title], "little")
    start = title + len(record.filename) + extra
    return Envelope(blob[:start], blob[start + record.file_size :])


def serialise(thing: Any, checksums: bool = False) -> bytes:
    """torch.save, without checksums unless asked for."""
    buffer = io.BytesIO()
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(checksums)
    torch.save(thing, buffer)
    torch.serialization.set_crc32_options(before)
    return buffer.getvalue()


def data_start(blob: memoryview, shape: tuple[int, ...], dtype: torch.dtype) -> int | None:
    """Where the raw data of such a tensor begins; None if torch.load has to read this blob."""
    for checksums in (False, True):
        expected = envelope(shape, dtype, checksums)
        whole = expected.length(math.prod(shape) * dtype.itemsize)
        if len(blob) == whole and blob[: len(expected.before)] == expected.before:
            return len(expected.before)
    return None
