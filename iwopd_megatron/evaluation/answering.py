"""A model that only writes answers, for evaluation and diagnostics: its recipe and its engine."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from iwopd_megatron.config.load import parse_answering_recipe
from iwopd_megatron.config.models import Model
from iwopd_megatron.config.recipe import Recipe

if TYPE_CHECKING:
    from iwopd_megatron.rollout.engine import RolloutEngine
    from iwopd_megatron.runtime.parallel import Parallel


def answering_recipe(
    recipe: Recipe, model: Model, out: Path, engine: str | None = None, top_p: float = 1.0
) -> Recipe:
    """What `recipe` says of rollouts, for another model; its servers are started where it gives
    no urls. Weights go through a folder of `out` that nothing else uses.
    """
    written = recipe.model_dump(mode="json")
    rollout = written["rollout"] | {"max_staleness": 0, "routing_replay": False, "top_p": top_p}
    rollout |= {
        "engine": engine or rollout["engine"],
        "sync_folder": str(out / "served_weights"),
    }
    if rollout["engine"] == "hf":
        del rollout["servers"]
    elif not recipe.rollout.servers.urls:
        rollout["servers"]["start"] = max(1, recipe.rollout.servers.start)
    tree = {
        "student": {"hf": str(model.hf), "dtype": model.dtype}, "rollout": rollout,
        "out": str(out), "evaluate": written["evaluate"],
        "data": {key: written["data"][key] for key in ("train", "enable_thinking")},
    }  # fmt: skip
    return parse_answering_recipe(tree, "--engine")


@contextlib.contextmanager
def answering_engine(
    recipe: Recipe, parallel: Parallel, say: Callable[[str], None]
) -> Iterator[RolloutEngine]:
    """The engine with the weights of `recipe.student.hf`. Collective."""
    from iwopd_megatron.rollout.make import make_engine
    from iwopd_megatron.weights.hf_reader import whole_tensors

    folder = recipe.student.hf
    engine = make_engine(recipe, parallel, say)
    try:
        engine.update(whole_tensors(folder), 0)
        yield engine
    finally:
        engine.close()
        if parallel.is_main:  # a copy of the whole model
            shutil.rmtree(recipe.rollout.sync_folder, ignore_errors=True)
