"""Published configurations by folder name, so that planning needs no model on disk.

Each family has what their config.json files say about architecture, nothing else.
"""

from __future__ import annotations

import re
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from iwopd_megatron.errors import RecipeError
from iwopd_megatron.hf.config import HfConfig, parse_hf_config, read_hf_config
from iwopd_megatron.hf.families import FAMILIES
from iwopd_megatron.toy_task import MODELS, toy_config


@cache
def known_models() -> dict[str, dict[str, Any]]:
    """Return the raw content of published config.json files by folder name."""
    families = FAMILIES.values()
    return {name: dict(one) for family in families for name, one in family.published.items()}


@cache
def known_model(name: str) -> HfConfig:
    """Return the published configuration of a model; KeyError for an unknown name."""
    return parse_hf_config(known_models()[name], f"the published {name}")


def planning_config(folder: Path) -> HfConfig:
    """Return the description of a folder's model, or of the known model of its name.

    NAME-<n>L is that model with n of its layers, as `iwopd prune` may leave it. RecipeError where
    there is neither.
    """
    if folder.exists():
        return read_hf_config(folder)
    if folder.parent.name == "toy_task" and folder.name in MODELS:  # what 'iwopd toy-task' writes
        config = {"model_type": "qwen3_moe"} | toy_config(folder.name)
        return parse_hf_config(config, f"the toy task's {folder.name}")
    name = folder.name.removesuffix("-FP8")  # its weights are held as plain ones
    pruned = re.fullmatch(r"(.+)-([1-9]\d*)L", name)
    if pruned is not None and pruned[1] in known_models():
        whole, layers = known_model(pruned[1]), int(pruned[2])
        return replace(whole, num_hidden_layers=min(layers, whole.num_hidden_layers))
    if name not in known_models():
        raise RecipeError(
            f"folder {folder} does not exist, and '{folder.name}' is no model known here; point it "
            f"at a Hugging Face folder, or name it like one of {', '.join(known_models())}."
        )
    return known_model(name)
