"""The record that an interrupted conversion leaves for the next: blocks written, their hashes.

unfinished.jsonl in the temporary folder: a line on what is converted, then a line for every block
written, {Hugging Face name: manifest entry}. The next run reads a recorded block back before it
keeps it, so nothing here has to reach the disk in any order.
"""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import torch

from iwopd_megatron.files import lock
from iwopd_megatron.files.rawfile import UNFINISHED, return_large_blocks
from iwopd_megatron.hf.config import HfConfig
from iwopd_megatron.hf.shapes import hf_shape
from iwopd_megatron.weights.manifest import DTYPE_NAMES, ManifestEntry, TensorDigest, entry
from iwopd_megatron.weights.table import WeightBlock

Entries = dict[str, ManifestEntry]  # by Hugging Face name
Rows = Iterator[tuple[str, torch.Tensor]]  # of Hugging Face tensors, each tensor's in order
Step = TypeVar("Step")  # how one piece of a block moves


def identity(source: Path, **settings: Any) -> dict[str, Any]:
    """Return what must be the same for a conversion to go on: the source's files and settings."""
    files = sorted(file for file in source.iterdir() if file.is_file())
    stats = {file.name: [file.stat().st_size, file.stat().st_mtime_ns] for file in files}
    return json.loads(json.dumps({"source": str(source.resolve()), "files": stats} | settings))


class ConversionRecord:
    """Which blocks are written into a temporary folder, read from its file and added to it."""

    def __init__(self, folder: Path, identity: dict[str, Any], say: Callable[[str], None]):
        """Read what an interrupted run left; what another source or settings left is removed."""
        file = folder / UNFINISHED
        lines = file.read_text(errors="replace").split("\n") if file.is_file() else []
        left = [path for path in folder.iterdir() if path.name != lock.NAME]
        if left and (not lines or _parse(lines[0]) != identity):
            say(f"{folder} is of another source or other settings; it is removed.")
            for path in left:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            lines = []
        self._known: Entries = {}
        for line in lines[1:]:
            self._known |= _parse(line)
        self.kept = 0  # tensors that did not have to be written again
        self._lock = threading.Lock()
        self._file = file.open("a", buffering=1)
        # after a torn line the next one begins on its own
        self._file.write("\n" if lines else json.dumps(identity) + "\n")

    def known(self, names: list[str]) -> Entries | None:
        """Return the entries of a block that was written, None if it was not."""
        return {x: self._known[x] for x in names} if self._known.keys() >= set(names) else None

    def keep(self, entries: Entries) -> None:
        """Count the tensors of a block that need not be written again. Any thread."""
        with self._lock:
            self.kept += len(entries)

    def add(self, entries: Entries) -> None:
        """Record a block that is written. Any thread."""
        with self._lock:
            self._file.write(json.dumps(entries) + "\n")

    def close(self) -> None:
        """Close the record's file."""
        self._file.close()


def convert_blocks(
    plan: list[tuple[WeightBlock, list[Step]]],
    write: Callable[[WeightBlock, list[Step]], Rows],
    read_back: Callable[[WeightBlock, list[Step]], Rows],
    hf: HfConfig,
    record: ConversionRecord,
    workers: int,
) -> Entries:
    """Write all blocks; return all entries in the plan's order. The first failure stops the rest.

    A block that the record knows is kept if what `read_back` reads has the same hashes.
    """

    def work(block: WeightBlock, steps: list[Step]) -> Entries:
        known = record.known(block.hf_names)
        if known is not None and _entries(block, read_back(block, steps), hf) == known:
            record.keep(known)
            return known
        entries = _entries(block, write(block, steps), hf)
        record.add(entries)
        return entries

    return_large_blocks()
    found: Entries = {}
    with ThreadPoolExecutor(max(1, workers)) as pool:
        futures = [pool.submit(work, *item) for item in plan]
        try:
            for future in futures:
                found |= future.result()
        finally:
            pool.shutdown(cancel_futures=True)
            record.close()
    return found


def _entries(block: WeightBlock, rows: Rows, hf: HfConfig) -> Entries:
    """Return manifest entries of a block's tensors from all their rows."""
    digests = {name: TensorDigest() for name in block.hf_names}
    dtypes: dict[str, str] = {}
    for name, part in rows:
        digests[name].update(part)
        dtypes[name] = DTYPE_NAMES[part.dtype]
    return {
        name: entry(hf_shape(name, hf), dtypes[name], digest.hex())
        for name, digest in digests.items()
    }


def _parse(line: str) -> dict[str, Any]:
    """Parse a line of the record; {} for one that a kill has torn."""
    try:
        content = json.loads(line)
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}
