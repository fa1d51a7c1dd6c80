"""Resume points: weights and optimiser as Megatron shards them, and a round's other state.

checkpoints/round_000010/ appears by one rename when it is complete (saver.py); files.json in it has
the size and xxh3 of every file, so that a damaged one is found before anything is loaded. Any
layout and any Megatron-Core from 0.16 to 0.19 can load it (`fully_reshardable`; Megatron's default
optimiser format cuts tensors where no layout finds them again, and is refused by its own writer).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
import xxhash

from iwopd_megatron.data.problems import Problem
from iwopd_megatron.errors import RecipeError
from iwopd_megatron.files.run_files import read_object
from iwopd_megatron.models.optimizer import go_on
from iwopd_megatron.records.resume import checkpoints
from iwopd_megatron.runtime.megatron import (
    OptimizerParamScheduler,
    ShardedObject,
    dist_checkpointing,
    megatron_optimizer,
    unwrap_model,
)
from iwopd_megatron.runtime.parallel import Parallel, gather
from iwopd_megatron.train.saver import LISTING, Saver, digest
from iwopd_megatron.weights.torch_dist.writer import METADATA


def newest(run: Path, parallel: Parallel, say: Callable[[str], None]) -> Path | None:
    """Find a run folder's newest sound checkpoint; damaged ones are named and skipped. Collective.

    Every rank reads its share of the files once.
    """
    for folder in reversed(checkpoints(run)):
        problems = gather(_damage(folder, parallel))
        damage = next((problem for problem in problems if problem), None)
        if damage is None:
            return folder
        say(f"checkpoint {folder} is damaged and skipped: {damage}")
    return None


def digest_of(problems: Iterable[tuple[Problem, list[int]]]) -> str:
    """Hash what a run trains on, in its order in the files: prompts, sources and responses."""
    state = xxhash.xxh3_64()
    for problem, ids in problems:
        state.update(repr((ids, problem.source, problem.response)).encode(errors="replace"))
    return state.hexdigest()


def _damage(folder: Path, parallel: Parallel) -> str | None:
    """Return what is wrong with this rank's share of the files, None if nothing is."""
    listing = folder / LISTING
    if not listing.is_file():
        return f"{LISTING} is missing."
    try:
        expected = read_object(listing)
    except RecipeError as error:
        return str(error)
    for name in sorted(expected)[parallel.rank :: parallel.world]:
        size, content = expected[name]
        file = folder / name
        if not file.is_file():
            return f"{name} is missing."
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size} bytes, not {size}."
        if digest(file) != content:
            return f"the content of {name} has changed."
    return None


def save(
    saver: Saver,
    chunks: list[torch.nn.Module],
    optimizer: megatron_optimizer.MegatronOptimizer,
    scheduler: OptimizerParamScheduler,
    extra: dict[str, Any],
    parallel: Parallel,
) -> None:
    """Begin a checkpoint of `extra["round"]`, which `saver` completes. Collective."""
    state = sharded_state(chunks, optimizer, parallel, is_loading=False)
    state |= {"scheduler": scheduler.state_dict(), "extra": extra}
    saver.start(state, extra["round"])


def load(
    folder: Path,
    chunks: list[torch.nn.Module],
    optimizer: megatron_optimizer.MegatronOptimizer,
    scheduler: OptimizerParamScheduler,
    parallel: Parallel,
) -> dict[str, Any]:
    """Restore a checkpoint into this layout; return what was saved as `extra`. Collective."""
    state = sharded_state(chunks, optimizer, parallel, is_loading=True)
    saved_world = dist_checkpointing.load_common_state_dict(str(folder))["extra"]["world"]
    if saved_world != parallel.world:
        del state["rng"]  # sampling is keyed by (seed, round, prompt); nothing else draws numbers
    loaded = dist_checkpointing.load(state, str(folder))
    for i, chunk in enumerate(unwrap_model(chunks)):
        chunk.load_state_dict(loaded[f"model{i}"])
    _agree_on_steps(loaded["optimizer"])
    with torch.no_grad():
        optimizer.load_state_dict(loaded["optimizer"])
    go_on(scheduler, loaded["scheduler"]["num_steps"])
    if "rng" in loaded:
        torch.set_rng_state(loaded["rng"])
    return loaded["extra"]


def _agree_on_steps(state: dict[Any, Any]) -> None:
    """Give every group of a loaded optimiser the steps that were taken.

    Rank 0 writes them for all: where its stage has no experts, experts' parameters took none.
    """
    parts = [state] if "optimizer" in state else list(state.values())
    groups = [group for part in parts for group in part["optimizer"]["param_groups"]]
    taken = [group["step"] for group in groups if "step" in group]
    for group in groups if taken else []:
        group["step"] = max(taken)


def sharded_state(
    chunks: list[torch.nn.Module],
    optimizer: megatron_optimizer.MegatronOptimizer,
    parallel: Parallel,
    is_loading: bool,
) -> dict[str, Any]:
    """Return what Megatron saves or loads: models, optimiser, this rank's generator."""
    state = model_state(chunks, parallel)
    state["optimizer"] = optimizer.sharded_state_dict(
        dict(state), is_loading=is_loading, metadata=_metadata(parallel)
    )
    state["rng"] = ShardedObject("rng", torch.get_rng_state(), (parallel.world,), (parallel.rank,))
    return state


def model_state(chunks: Sequence[torch.nn.Module], parallel: Parallel) -> dict[str, Any]:
    """Return this rank's weights as Megatron saves or loads them, by chunk."""
    return {
        f"model{i}": chunk.sharded_state_dict(metadata=_metadata(parallel))
        for i, chunk in enumerate(unwrap_model(list(chunks)))
    }


def _metadata(parallel: Parallel) -> dict[str, Any]:
    """Return what Megatron is told of the format, and the group its optimiser is sharded over."""
    return METADATA | {"dp_cp_group": parallel.dp_cp.group}
