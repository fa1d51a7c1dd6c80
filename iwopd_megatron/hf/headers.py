"""What a Hugging Face folder's weight files hold, from their headers alone: no weight is read.

A safetensors file is 8 bytes with the header's length N, N bytes of JSON
{name: {dtype, shape, data_offsets}}, and the data. Positions in the file are wanted here, without
torch and numpy, which the library's reader does not give.
"""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path
from typing import Any, NamedTuple

from iwopd_megatron.errors import RecipeError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
BITS = {
    "F64": 64,
    "F32": 32,
    "F16": 16,
    "BF16": 16,
    "I64": 64,
    "I32": 32,
    "I16": 16,
    "I8": 8,
    "U64": 64,
    "U32": 32,
    "U16": 16,
    "U8": 8,
    "BOOL": 8,
    "F8_E4M3": 8,
    "F8_E5M2": 8,
    "F8_E8M0": 8,
    "F4": 4,
}
LFS = b"version https://git-lfs"
LONGEST_HEADER = 100_000_000  # bytes; the library's own limit


class Stored(NamedTuple):
    """A stored tensor: file, dtype as safetensors names it, shape, and its bytes [start, stop)."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


def stored_tensors(folder: Path) -> dict[str, Stored]:
    """Return every tensor of the folder's weight files by name; RecipeError where they are unfit.

    As transformers chooses: `model.safetensors` where it exists, whatever an index beside it
    says, or else the files that the index names.
    """
    if (folder / SINGLE).is_file():
        return read_header(folder / SINGLE)
    index = folder / INDEX
    if not index.is_file():
        raise RecipeError(f"{folder} has neither {SINGLE} nor {INDEX}; {_instead(folder)}.")
    weight_map = _weight_map(index)
    found: dict[str, Stored] = {}
    for name in sorted(set(weight_map.values())):
        for tensor, stored in read_header(folder / name).items():
            if tensor in found:
                raise RecipeError(
                    f"{folder}: {tensor} is in {found[tensor].file.name} and in {name}; "
                    "copy the model's original files."
                )
            found[tensor] = stored
    for tensor, name in weight_map.items():
        if tensor not in found or found[tensor].file.name != name:
            raise RecipeError(f"{folder / name} lacks the tensor '{tensor}' of the index.")
    return found


def _instead(folder: Path) -> str:
    """Return what the folder has instead of readable weights, and what to do, as a phrase."""
    shards = sorted(folder.glob("*.safetensors"))
    if shards:
        return f"without its index {shards[0].name} is not read: copy the original index too"
    others = (
        sorted(folder.glob("*.bin")) + sorted(folder.glob("*.pt*")) + sorted(folder.glob("*.gguf"))
    )
    if others:
        return (
            f"{others[0].name} is not read: load the model in transformers and save it with "
            "save_pretrained"
        )
    return "its weights are missing"


def _weight_map(index: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8-sig"))["weight_map"]
        if not weight_map or not all(isinstance(file, str) for file in weight_map.values()):
            raise ValueError("its weight_map names no files")
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise RecipeError(f"{index} is not a safetensors index: {error!r}.") from None
    outside = next((f for f in weight_map.values() if Path(f).name != f), None)
    if outside is not None:
        raise RecipeError(f"{index} names the file {outside!r}; it must lie beside the index.")
    return weight_map


def read_header(file: Path) -> dict[str, Stored]:
    """Return every tensor of a safetensors file by name; RecipeError if it is cut or damaged."""
    try:
        with file.open("rb") as stream:
            size = file.stat().st_size
            if stream.read(len(LFS)) == LFS:
                raise ValueError("it is a pointer of Git LFS, not the file itself (git lfs pull)")
            stream.seek(0)
            start = 8 + struct.unpack("<Q", stream.read(8))[0]
            if start > min(size, LONGEST_HEADER):
                raise ValueError(f"its header would end at byte {start:,}, the file at {size:,}")
            header = json.loads(stream.read(start - 8))
        header.pop("__metadata__", None)
        tensors = {name: _stored(file, entry, start) for name, entry in header.items()}
        _check_cover(tensors, start, size)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
        what = error.strerror if isinstance(error, OSError) else f"{error}"
        raise RecipeError(
            f"{file} cannot be read as safetensors: {what}; copy the original file."
        ) from None
    return tensors


def _stored(file: Path, entry: dict[str, Any], base: int) -> Stored:
    shape, (start, stop) = tuple(entry["shape"]), entry["data_offsets"]
    if entry["dtype"] not in BITS:
        raise ValueError(f"its dtype {entry['dtype']!r} is unknown")
    if stop - start != math.prod(shape) * BITS[entry["dtype"]] // 8:
        raise ValueError(f"a tensor of shape {shape} has {stop - start} bytes")
    return Stored(file, entry["dtype"], shape, base + start, base + stop)


def _check_cover(tensors: dict[str, Stored], start: int, size: int) -> None:
    """Refuse tensors whose bytes overlap, leave gaps or do not reach the end of the file."""
    end = start
    for stored in sorted(tensors.values(), key=lambda stored: (stored.start, stored.stop)):
        if stored.start != end:
            raise ValueError(f"its tensors overlap or leave a gap at byte {end:,}")
        end = stored.stop
    if end != size:
        raise ValueError(f"its tensors end at byte {end:,}, the file at {size:,}")
