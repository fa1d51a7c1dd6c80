"""JSON files that a run writes, most with an object a line: whole lines, damage told or read past.

A crash or a full disk leaves half a last line. It is left out with a note when read, and cut off
before the next line is written, so that no other line is ever damaged by it. Standard library only.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from iwopd_megatron.errors import RecipeError

Keys = Mapping[str, type | tuple[type, ...]]


def read_records(path: Path, keys: Keys | None = None) -> list[dict[str, Any]]:
    """Return the records of a file, NaN as None; a damaged last line is left out with a note.

    keys: what every record has, and its type. RecipeError names a damaged line before the last.
    """
    content = path.read_text("utf-8", errors="replace").split("\n")
    lines = [(number, line) for number, line in enumerate(content, 1) if line.strip()]
    records = []
    for number, line in lines:
        record, damage = _parsed(line, keys or {})
        if damage is None:
            records.append(record)
        elif number < lines[-1][0]:
            raise RecipeError(f"{path}: line {number} is damaged: {damage}; remove that line.")
        else:
            _note(f"{path}: its last line is damaged ({damage}), as a crash leaves it; left out.")
    return records


def _parsed(line: str, keys: Keys) -> tuple[dict[str, Any], str | None]:
    """Return (record, None), or ({}, what is wrong with it)."""
    try:
        record = json.loads(line, parse_constant=lambda _: None)
    except ValueError:
        return {}, "it is not JSON"
    if not isinstance(record, dict):
        return {}, f"it holds a {type(record).__name__}, not an object"
    for key, kind in keys.items():
        if key not in record:
            return {}, f"it has no '{key}'"
        if not isinstance(record[key], kind):
            return {}, f"'{key}' is {json.dumps(record[key])[:40]}"
    return record, None


@cache
def _note(text: str) -> None:
    """Print a note, once in a process and by rank 0 only."""
    if os.environ.get("RANK", "0") == "0":
        print(f"note: {text}", file=sys.stderr)


def append_record(path: Path, record: dict[str, Any]) -> None:
    """Add a record as one whole line: after an OSError (a full disk) the file is what it was."""
    left = json.dumps(record, ensure_ascii=False).encode("utf-8", errors="backslashreplace") + b"\n"
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        end = _end_of_lines(descriptor)
        try:
            while left:
                left = left[os.write(descriptor, left) :]
        except OSError:
            os.ftruncate(descriptor, end)
            raise
    finally:
        os.close(descriptor)


def _end_of_lines(descriptor: int) -> int:
    """Cut off half a line that a crash left behind, and return the file's size in bytes."""
    size = os.fstat(descriptor).st_size
    if not size or os.pread(descriptor, 1, size - 1) == b"\n":
        return size
    content = os.pread(descriptor, size, 0)
    end = content.rfind(b"\n") + 1
    if _parsed(content[end:].decode(errors="replace"), {})[1] is None:  # only its newline lacks
        return size + os.write(descriptor, b"\n")
    os.ftruncate(descriptor, end)
    return end


def read_object(path: Path) -> dict[str, Any]:
    """Return the object of a .json file that a run wrote; RecipeError where it is damaged."""
    found, damage = _parsed(path.read_text("utf-8", errors="replace"), {})
    if damage is not None:
        raise RecipeError(f"{path} is damaged: {damage}; remove it.")
    return found


def write_whole(path: Path, text: str) -> None:
    """Write a file that is complete or not there at all."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)
