"""Which run folder a recipe may start in or go on with. Imports no torch."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import yaml

from iwopd_megatron.errors import RecipeError

if TYPE_CHECKING:
    from iwopd_megatron.config import Recipe

# What a resumed run may change without becoming another run.
MAY_CHANGE = (
    "out", "processes", "student.parallel", "student.recompute", "teacher.offload",
    "teacher.microbatch_tokens", "teacher.urls", "teacher.service", "teacher.timeout_s",
    "teacher.patience_s", "teacher.max_in_flight", "base.offload", "base.microbatch_tokens",
    "rollout.batch_size", "rollout.servers", "rollout.sync", "rollout.sync_folder",
    "rollout.sync_address", "rollout.pause", "rollout.verify_every", "rollout.stream_scoring",
    "train.rounds", "train.microbatch_tokens", "evaluate", "checkpoint",
    "gates", "cluster", "wandb",
)  # fmt: skip


def check_start(recipe: Recipe, resume: bool) -> None:
    """Refuse to start over a run, and to resume it with other settings."""
    if not resume and (recipe.out / "metrics.jsonl").exists():
        raise RecipeError(
            f"{recipe.out} already holds a run; "
            "add --resume, or choose another folder with out=FOLDER."
        )
    if resume:
        check_resume(recipe)


def check_resume(recipe: Recipe) -> None:
    """Refuse to go on with a run folder that was started with other settings."""
    stored = recipe.out / "recipe.yaml"
    if not stored.is_file():
        return
    before = _flat(yaml.safe_load(stored.read_text()))
    now = _flat(recipe.model_dump(mode="json"))
    for key in sorted(before):  # a setting this version added has its default
        plain = re.sub(r"^teachers\.[^.]*\.", "teacher.", key)
        may_change = any(plain == free or plain.startswith(free + ".") for free in MAY_CHANGE)
        if before.get(key) != now.get(key) and not may_change:
            raise RecipeError(
                f"{key} is {now.get(key)} but {recipe.out} was started with {before.get(key)}; "
                "put it back to resume, or start a new run with out=FOLDER."
            )


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"train.lr": 1e-5, ...}"""
    out: dict[str, Any] = {}
    for key, value in tree.items():
        nested = isinstance(value, dict)
        out |= _flat(value, f"{prefix}{key}.") if nested else {prefix + key: value}
    return out
