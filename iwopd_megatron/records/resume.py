"""Which run folder a recipe may start in or go on with. Imports no torch.

On resume a setting either follows its new value from the next round on, as if the run had had it
from the start (all that depends on it is computed from the recipe and the round), or is refused.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from iwopd_megatron.errors import RecipeError
from iwopd_megatron.files.yaml_file import read_yaml
from iwopd_megatron.records.runlog import read_metrics

if TYPE_CHECKING:
    from iwopd_megatron.config.recipe import Recipe

# What a resumed run may change without becoming another run.
MAY_CHANGE = (
    "out",
    "processes",
    "student.parallel",
    "student.recompute",
    "student.megatron",
    "teacher.offload",
    "teacher.microbatch_tokens",
    "teacher.urls",
    "teacher.service",
    "teacher.timeout_s",
    "teacher.patience_s",
    "teacher.max_in_flight",
    "base.offload",
    "base.microbatch_tokens",
    "data.benchmarks",
    "rollout.batch_size",
    "rollout.threads",
    "rollout.servers",
    "rollout.sync",
    "rollout.sync_folder",
    "rollout.sync_address",
    "rollout.pause",
    "rollout.verify_every",
    "rollout.stream_scoring",
    "train.rounds",
    "train.microbatch_tokens",
    "evaluate",
    "checkpoint",
    "gates",
    "cluster",
    "wandb",
)
TRACES = ("lock", "recipe.yaml", "metrics.jsonl", "checkpoints", "launch")


def has_begun(run: Path) -> bool:
    """Return whether a run was ever started in this folder."""
    return any((run / name).exists() for name in TRACES)


def checkpoints(run: Path) -> list[Path]:
    """Return the folders of the run's complete checkpoints, oldest first."""
    found = (run / "checkpoints").glob("round_*")
    return sorted(path for path in found if re.fullmatch(r"round_\d{6}", path.name))


def check_start(recipe: Recipe, resume: bool) -> None:
    """Refuse to start over a run, to resume one that never was, or with settings it cannot take."""
    run = recipe.out
    if not resume and ((run / "metrics.jsonl").exists() or checkpoints(run)):
        raise RecipeError(
            f"{run} already holds a run; add --resume, or choose another folder with out=FOLDER."
        )
    if resume and not has_begun(run):
        raise RecipeError(
            f"--resume: no run was started in {run}; leave --resume out to start one there, or "
            "name the run's folder with out=FOLDER."
        )
    if resume:
        check_resume(recipe)


def check_resume(recipe: Recipe) -> None:
    """Refuse to go on with a run folder that was started with other settings, or that is over."""
    stored = recipe.out / "recipe.yaml"
    if stored.is_file():
        _check_settings(recipe, stored)
    _check_rounds(recipe)


def _check_settings(recipe: Recipe, stored: Path) -> None:
    try:
        before = type(recipe).model_validate(read_yaml(stored, "the run's recipe"))
    except ValidationError:
        raise RecipeError(
            f"{stored} is not what a run of this version wrote; put it back to resume, or start a "
            "new run with out=FOLDER."
        ) from None
    old, new = (_flat(one.model_dump(mode="json")) for one in (before, recipe))
    for key in sorted(old.keys() | new.keys()):
        plain = re.sub(r"^teachers\.[^.]*\.", "teacher.", key)
        may_change = any(plain == free or plain.startswith(free + ".") for free in MAY_CHANGE)
        if old.get(key) != new.get(key) and not may_change:
            raise RecipeError(
                f"{key} is {new.get(key)} but {recipe.out} was started with {old.get(key)}; "
                "put it back to resume, or start a new run with out=FOLDER."
            )


def _check_rounds(recipe: Recipe) -> None:
    """Refuse fewer rounds than are trained, and more where nothing was kept to train on from."""
    run, rounds, saved = recipe.out, recipe.train.rounds, checkpoints(recipe.out)
    done = int(saved[-1].name.partition("_")[2]) if saved else 0
    if done > rounds:
        raise RecipeError(
            f"train.rounds={rounds} but {run} is already trained for {done}; write at least "
            f"train.rounds={done}, or start a new run with out=FOLDER."
        )
    if saved or not (run / "hf" / "config.json").is_file():
        return
    last = max((line["round"] for line in read_metrics(run)), default=0)
    if last < rounds:
        raise RecipeError(
            f"{run} ended after round {last} and kept no checkpoint (checkpoint.every is null), so "
            f"that train.rounds={rounds} cannot go on from there; start a new run with out=FOLDER."
        )


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the tree as one level: {"train.lr": 1e-5, ...}; lists of sections by their place."""
    out: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, list) and any(isinstance(item, dict) for item in value):
            value = {str(place): item for place, item in enumerate(value)}
        nested = isinstance(value, dict)
        out |= _flat(value, f"{prefix}{key}.") if nested else {prefix + key: value}
    return out
