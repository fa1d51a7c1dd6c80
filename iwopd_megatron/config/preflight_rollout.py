"""What is refused of rollout servers before any process starts. Imports no torch."""

from __future__ import annotations

import os
import shutil
from typing import TYPE_CHECKING

from iwopd_megatron.errors import RecipeError
from iwopd_megatron.hf.config import read_hf_config

if TYPE_CHECKING:
    from iwopd_megatron.config.recipe import Recipe


def check_rollout(recipe: Recipe) -> None:
    """Refuse rollout settings that the engine does not have, and servers that cannot be started."""
    rollout, servers = recipe.rollout, recipe.rollout.servers
    if rollout.bf16_products:
        _check_bf16_products(recipe)
    if rollout.engine == "hf":
        _check_embedded(recipe)
        return
    launched = recipe.cluster.rollout if recipe.cluster is not None else 0
    if not servers.urls and not servers.start and not launched:
        raise RecipeError(
            f"rollout.engine={rollout.engine} needs servers; name running ones in "
            "rollout.servers.urls, or write rollout.servers.start=1 to start one here."
        )
    for url in servers.urls:
        if not url.startswith(("http://", "https://")):
            raise RecipeError(
                f"rollout.servers.urls: '{url}' is not a URL; write http://HOST:PORT."
            )
    if not servers.urls and servers.python is not None:
        found = shutil.which(servers.python)
        if found is None or not os.access(found, os.X_OK):
            raise RecipeError(
                f"rollout.servers.python={servers.python} is not there; install {rollout.engine} "
                "in an environment and name its Python "
                f"(make test-{rollout.engine} builds one for CPUs)."
            )
    if rollout.max_staleness and recipe.loss.tis_cap is None:
        raise RecipeError(
            "rollout.max_staleness=1 trains on answers of older weights, which only the truncated "
            "importance weight corrects; set loss.tis_cap=5, or max_staleness=0."
        )
    _check_plain(recipe)
    if rollout.engine == "vllm":
        _check_vllm(recipe)
    if rollout.routing_replay:
        _check_replay(recipe)


def _check_plain(recipe: Recipe) -> None:
    """Refuse scaled weights: servers hold them scaled, and the trainer sends plain ones."""
    folder, engine = recipe.student.hf, recipe.rollout.engine
    if read_hf_config(folder).quantization is not None:
        raise RecipeError(
            f"rollout.engine={engine} cannot take new weights for {folder}, whose weights are "
            "scaled (FP8); write them plainly with iwopd convert and iwopd export and name that "
            "folder, or write rollout.engine=hf."
        )


def _check_replay(recipe: Recipe) -> None:
    """Refuse to replay experts that the student does not have or the engine does not return."""
    if not read_hf_config(recipe.student.hf).num_experts:
        raise RecipeError(
            f"rollout.routing_replay needs a student with experts, and {recipe.student.hf} is "
            "dense; write rollout.routing_replay=false."
        )
    if recipe.rollout.engine != "sglang":
        raise RecipeError(
            "rollout.routing_replay needs an engine that returns the experts it chose, and "
            f"{recipe.rollout.engine} does not; write rollout.engine=sglang, or "
            "rollout.routing_replay=false."
        )


def _check_bf16_products(recipe: Recipe) -> None:
    """Refuse bf16 products of an engine or a student that has them by another setting."""
    if recipe.rollout.engine != "hf":
        raise RecipeError(
            "rollout.bf16_products is of the embedded engine, and servers have a dtype of their "
            "own; write it in rollout.servers.args, and rollout.bf16_products=false."
        )
    if recipe.student.dtype != "fp32":
        raise RecipeError(
            f"rollout.bf16_products is for fp32 students, and student.dtype={recipe.student.dtype} "
            "multiplies in it already; write rollout.bf16_products=false."
        )


def _check_vllm(recipe: Recipe) -> None:
    """Refuse top_p < 1: vLLM's log-probs are then of the tokens left only."""
    rollout = recipe.rollout
    if rollout.top_p < 1:
        raise RecipeError(
            f"rollout.top_p={rollout.top_p} needs log-probs of the whole distribution, which vLLM "
            "does not return; write rollout.top_p=1, or rollout.engine=sglang."
        )


def _check_embedded(recipe: Recipe) -> None:
    """Refuse what needs servers; the embedded engine's weights are the trainer's own."""
    rollout = recipe.rollout
    if rollout.routing_replay:
        _check_replay(recipe)
    if rollout.max_staleness:
        raise RecipeError(
            "rollout.max_staleness needs rollout servers; set rollout.engine=sglang, or leave it "
            "out."
        )
    if rollout.servers.urls or rollout.servers.start:
        raise RecipeError(
            "rollout.servers has no use with rollout.engine=hf, the embedded engine; set "
            "rollout.engine=sglang, or remove rollout.servers."
        )
