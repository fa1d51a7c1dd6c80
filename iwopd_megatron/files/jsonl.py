"""Lines of JSON that users bring: one object a line, and what else such a file may turn out to be.

A byte-order mark and blank lines are passed over; lines are counted as an editor counts them. Every
data file, held-out set and benchmark that is not Parquet is read here.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from iwopd_megatron.errors import RecipeError

Row = tuple[str, dict[str, Any]]  # where it stands, and what it holds
# What a file of another format begins with, and what to do about it. UTF-32 before UTF-16, whose
# mark it begins with.
FORMATS = (
    (b"\x1f\x8b", "compressed with gzip; unpack it with gunzip"),
    (b"\x28\xb5\x2f\xfd", "compressed with zstd; unpack it with unzstd"),
    (b"BZh", "compressed with bzip2; unpack it with bunzip2"),
    (b"\xfd7zXZ\x00", "compressed with xz; unpack it with unxz"),
    (b"PK\x03\x04", "a zip archive; unpack it with unzip"),
    (b"PAR1", "Parquet; let its name end with .parquet"),
    (b"version https://git-lfs", "a pointer of Git LFS, not the data; run git lfs pull"),
    (codecs.BOM_UTF32_LE, "not UTF-8 but UTF-32; re-save it as UTF-8"),
    (codecs.BOM_UTF32_BE, "not UTF-8 but UTF-32; re-save it as UTF-8"),
    (codecs.BOM_UTF16_LE, "not UTF-8 but UTF-16; re-save it as UTF-8"),
    (codecs.BOM_UTF16_BE, "not UTF-8 but UTF-16; re-save it as UTF-8"),
)


def read_jsonl(file: Path) -> Iterator[Row]:
    """Yield the objects of a file, each with `FILE line N`; RecipeError for anything else in it."""
    try:
        with file.open("rb") as lines:  # only b"\n" ends one: strings may hold other separators
            yield from _rows(file, lines)
    except OSError as error:
        raise RecipeError(f"{file} cannot be read: {error.strerror}.") from None


def _rows(file: Path, lines: Iterator[bytes]) -> Iterator[Row]:
    is_first = True
    for number, line in enumerate(lines, 1):
        where = f"{file} line {number}"
        if number == 1:
            _refuse_formats(file, line)
        line = line.removeprefix(codecs.BOM_UTF8).strip()  # joined files have a mark each
        if not line:
            continue
        if is_first:
            _refuse_documents(file, line)
        is_first = False
        yield where, _object(line, where)


def _refuse_formats(file: Path, start: bytes) -> None:
    for mark, what in FORMATS:
        if start.startswith(mark):
            raise RecipeError(f"{file} is {what}.")
    if b"\0" in start[:4]:
        raise RecipeError(f"{file} is not UTF-8 but UTF-16 or binary; re-save it as UTF-8.")


def _refuse_documents(file: Path, first: bytes) -> None:
    """Refuse a file that is one JSON value, on one line or over many; RecipeError."""
    if first.startswith(b"["):
        raise RecipeError(
            f"{file} is a JSON array, not JSON lines; write one object a line: "
            f"jq -c '.[]' {file} > NEW.jsonl."
        )
    if first == b"{":
        raise RecipeError(
            f"{file} has an object over several lines; write each on a line of its own: "
            f"jq -c . {file} > NEW.jsonl."
        )


def _object(line: bytes, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise RecipeError(
            f"{where} is not UTF-8: byte {error.start} of the line; re-save the file as UTF-8."
        ) from None
    except json.JSONDecodeError as error:
        raise RecipeError(
            f"{where} is not JSON ({error.msg} at column {error.colno}); "
            "each line holds one object."
        ) from None
    except (ValueError, RecursionError) as error:  # a number of too many digits, too deep a nest
        raise RecipeError(f"{where} cannot be read as JSON: {error}.") from None
    if not isinstance(row, dict):
        raise RecipeError(f"{where} holds {_kind(row)}, not an object.")
    return row


def _kind(value: Any) -> str:
    names = {list: "an array", str: "a text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")
