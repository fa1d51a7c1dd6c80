"""A model that only writes answers, for `iwopd eval` and `iwopd prefixes`.

`answering_recipe` makes a recipe for it out of a training recipe, `answering_engine` its rollout
engine with the model's weights.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from iwopd_megatron.config.load import parse_answering_recipe
from iwopd_megatron.config.models import Model
from iwopd_megatron.config.recipe import Recipe

if TYPE_CHECKING:  # commands make recipes without importing torch
    from iwopd_megatron.rollout.engine import RolloutEngine
    from iwopd_megatron.runtime.parallel import Parallel

SERVED_WEIGHTS = "served_weights"


def answering_recipe(
    recipe: Recipe, model: Model, out: Path, engine: str | None = None, top_p: float = 1.0
) -> Recipe:
    """Return a recipe with the rollouts of `recipe`, for another model.

    Servers are started where it gives no urls; weights go through a folder of `out` that nothing
    else uses. engine: instead of the recipe's. RecipeError where the rollouts do not fit.
    """
    written = recipe.model_dump(mode="json")
    rollout = written["rollout"] | {"max_staleness": 0, "routing_replay": False, "top_p": top_p}
    rollout |= {
        "engine": engine or rollout["engine"],
        "sync_folder": str(out / SERVED_WEIGHTS),
    }
    if rollout["engine"] == "hf":
        del rollout["servers"]
    elif not recipe.rollout.servers.urls:
        rollout["servers"]["start"] = max(1, recipe.rollout.servers.start)
    tree = {
        "student": {"hf": str(model.hf), "dtype": model.dtype},
        "rollout": rollout,
        "out": str(out),
        "evaluate": written["evaluate"],
        "data": {key: written["data"][key] for key in ("train", "enable_thinking")},
    }
    return parse_answering_recipe(tree, "--engine")


@contextlib.contextmanager
def answering_engine(
    recipe: Recipe, parallel: Parallel, say: Callable[[str], None]
) -> Iterator[RolloutEngine]:
    """Give the engine of an answering recipe, with its student's weights, and close it. Collective.

    say: tells people what happens to servers.
    """
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
            shutil.rmtree(recipe.out / SERVED_WEIGHTS, ignore_errors=True)
