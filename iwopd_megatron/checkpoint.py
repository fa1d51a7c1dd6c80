"""Resume points: weights and optimiser by Megatron dist_checkpointing, and a round's other state.

checkpoints/round_000010/ appears by one rename when it is complete; files.json in it has the size
and xxh3 of every file, so that a damaged one is found before anything is loaded. Any layout can
load it (`fully_reshardable`; Megatron's default optimiser format is refused by its own writer in
0.16.1).
"""

from __future__ import annotations

import json
import queue
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import xxhash

from iwopd_megatron.parallel import Parallel, gather
from iwopd_megatron.rawfile import flush
from iwopd_megatron.torch_dist import METADATA

from megatron.core import dist_checkpointing  # isort: skip
from megatron.core.dist_checkpointing.mapping import ShardedObject  # isort: skip
from megatron.core.dist_checkpointing.strategies import filesystem_async  # isort: skip
from megatron.core.utils import unwrap_model  # isort: skip

# Saves are synchronous, so results stay in this process. Megatron would start a manager process for
# them, which imports everything again and takes seconds.
filesystem_async._results_queue = queue.Queue()

LISTING = "files.json"


def newest(run: Path, parallel: Parallel, say: Callable[[str], None]) -> Path | None:
    """The newest sound checkpoint of a run folder; damaged ones are named and skipped. Collective.

    Every rank reads its share of the files once.
    """
    found = [
        p for p in (run / "checkpoints").glob("round_*") if re.fullmatch(r"round_\d{6}", p.name)
    ]
    for folder in sorted(found, reverse=True):
        problems = gather(_damage(folder, parallel))
        damage = next((problem for problem in problems if problem), None)
        if damage is None:
            return folder
        say(f"checkpoint {folder} is damaged and skipped: {damage}")
    return None


def _damage(folder: Path, parallel: Parallel) -> str | None:
    """What is wrong with this rank's share of the files."""
    listing = folder / LISTING
    if not listing.is_file():
        return f"{LISTING} is missing."
    expected = json.loads(listing.read_text())
    for name in sorted(expected)[parallel.rank :: parallel.world]:
        size, digest = expected[name]
        file = folder / name
        if not file.is_file():
            return f"{name} is missing."
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size} bytes, not {size}."
        if _digest(file) != digest:
            return f"the content of {name} has changed."
    return None


def _digest(file: Path) -> str:
    state = xxhash.xxh3_64()
    with file.open("rb") as stream:
        while block := stream.read(2**24):
            state.update(block)
    return state.hexdigest()


def _write_listing(folder: Path, parallel: Parallel) -> None:
    """files.json of a complete folder, every rank reading its share; all of it on disk."""
    names = sorted(path.name for path in folder.iterdir())
    own = {}
    for name in names[parallel.rank :: parallel.world]:
        own[name] = (folder / name).stat().st_size, _digest(folder / name)
        flush(folder / name)
    parts = gather(own)
    if parallel.is_main:
        (folder / LISTING).write_text(json.dumps({k: v for part in parts for k, v in part.items()}))
        flush(folder / LISTING)
        flush(folder)


def save(
    run: Path,
    chunks: list,
    optimizer: Any,
    scheduler: Any,
    extra: dict[str, Any],
    parallel: Parallel,
    keep: int,
) -> None:
    """Write a checkpoint of `extra["round"]`; keep the newest `keep`. Collective and atomic."""
    final = run / "checkpoints" / f"round_{extra['round']:06d}"
    partial = final.with_suffix(".partial")
    if parallel.is_main:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    dist.barrier()
    state = _state(chunks, optimizer, parallel, is_loading=False)
    state |= {"scheduler": scheduler.state_dict(), "extra": extra}
    dist_checkpointing.save(state, str(partial), content_metadata=METADATA)
    dist.barrier()
    _write_listing(partial, parallel)
    if parallel.is_main:
        if final.exists():
            shutil.rmtree(final)
        partial.rename(final)
        flush(final.parent)
        for old in sorted(final.parent.glob("round_??????"))[:-keep]:
            shutil.rmtree(old)
    dist.barrier()


def load(
    folder: Path, chunks: list, optimizer: Any, scheduler: Any, parallel: Parallel
) -> dict[str, Any]:
    """Restore a checkpoint into this layout; returns what was saved as `extra`."""
    state = _state(chunks, optimizer, parallel, is_loading=True)
    saved_world = dist_checkpointing.load_common_state_dict(str(folder))["extra"]["world"]
    if saved_world != parallel.world:
        del state["rng"]  # sampling is keyed by (seed, round, prompt); nothing else draws numbers
    loaded = dist_checkpointing.load(state, str(folder))
    for i, chunk in enumerate(unwrap_model(chunks)):
        chunk.load_state_dict(loaded[f"model{i}"])
    with torch.no_grad():
        optimizer.load_state_dict(loaded["optimizer"])
    scheduler.num_steps = 0  # load_state_dict adds the saved number to it
    scheduler.load_state_dict(loaded["scheduler"])
    if "rng" in loaded:
        torch.set_rng_state(loaded["rng"])
    return loaded["extra"]


def _state(chunks: list, optimizer: Any, parallel: Parallel, is_loading: bool) -> dict[str, Any]:
    metadata = METADATA | {"dp_cp_group": parallel.dp_cp.group}
    state: dict[str, Any] = {
        f"model{i}": chunk.sharded_state_dict(metadata=metadata)
        for i, chunk in enumerate(unwrap_model(chunks))
    }
    state["optimizer"] = optimizer.sharded_state_dict(
        dict(state), is_loading=is_loading, metadata=metadata
    )
    state["rng"] = ShardedObject("rng", torch.get_rng_state(), (parallel.world,), (parallel.rank,))
    return state
