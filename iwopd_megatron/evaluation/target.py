"""What `iwopd eval` is pointed at: a recipe, a run, a Megatron checkpoint or a model folder."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from iwopd_megatron.config.load import apply_override, load_recipe, parse_recipe
from iwopd_megatron.config.recipe import Recipe
from iwopd_megatron.errors import RecipeError
from iwopd_megatron.files.iterations import iteration_folder
from iwopd_megatron.files.shipped import find_recipe
from iwopd_megatron.hf.folder import check_model

MAX_TOKENS = 16384


@dataclass(frozen=True)
class Target:
    """A model that answers benchmarks, and the recipe whose settings it answers under.

    folder: its Hugging Face folder; identity: what it was made from, so that answers of another
    model are not taken for its own; out: where results go if nobody says.
    """

    recipe: Recipe
    folder: Path
    identity: dict[str, Any]
    out: Path


@contextlib.contextmanager
def open_target(path: Path, overrides: list[str], template: Path | None) -> Iterator[Target]:
    """Yield the target that a path is; a checkpoint is exported into a folder for the time.

    template: config and tokenizer of a checkpoint without its own. RecipeError where the path is
    nothing that can be evaluated.
    """
    if path.is_dir():
        with _open_folder(path, overrides, template) as target:
            yield target
        return
    file = find_recipe(path)
    if not file.is_file():
        raise _unknown(path)
    recipe = load_recipe(file, overrides)
    is_trained = (recipe.out / "hf" / "config.json").is_file()
    if not is_trained and recipe.student.random_init is not None:
        raise RecipeError(f"{recipe.out} has no trained model, and the student starts random.")
    folder = recipe.out / "hf" if is_trained else recipe.student.hf
    out = recipe.out / "eval" / ("trained" if is_trained else "start")
    yield Target(recipe, folder, _identity(folder), out)


@contextlib.contextmanager
def _open_folder(path: Path, overrides: list[str], template: Path | None) -> Iterator[Target]:
    """Yield the target of a run folder, a model folder, a checkpoint or a root of iterations."""
    own = Path("runs/eval") / path.resolve().name
    path = iteration_folder(path)
    if (path / "recipe.yaml").is_file():
        recipe = load_recipe(path / "recipe.yaml", overrides)
        hf = path / "hf"
        if (hf / "config.json").is_file():
            yield Target(recipe, hf, _identity(hf), path / "eval" / "trained")
            return
        found = sorted((path / "checkpoints").glob("round_??????"))
        if not found:
            raise RecipeError(f"{path} has neither hf/ nor a checkpoint; train it first.")
        with _exported(found[-1], template) as folder:
            yield Target(recipe, folder, _identity(found[-1]), path / "eval" / found[-1].name)
    elif (path / "config.json").is_file():
        yield Target(_plain_recipe(path, overrides), path, _identity(path), own)
    elif (path / ".metadata").is_file():
        with _exported(path, template) as folder:
            yield Target(_plain_recipe(folder, overrides), folder, _identity(path), own)
    else:
        raise _unknown(path)


def _unknown(path: Path) -> RecipeError:
    return RecipeError(
        f"{path} is neither a recipe nor a run, a checkpoint or a Hugging Face folder."
    )


@contextlib.contextmanager
def _exported(checkpoint: Path, template: Path | None) -> Iterator[Path]:
    """Yield a Hugging Face folder of a checkpoint, which is removed afterwards."""
    from iwopd_megatron.weights.convert import megatron_to_hf

    with tempfile.TemporaryDirectory(prefix="iwopd-eval-") as folder:
        megatron_to_hf(checkpoint, Path(folder) / "hf", template)
        yield Path(folder) / "hf"


def _plain_recipe(folder: Path, overrides: list[str]) -> Recipe:
    """Return the defaults around a model folder, with overrides as for a recipe."""
    longest = check_model(folder).context_length
    tree: dict[str, Any] = {
        "out": "runs/eval",
        "student": {"hf": str(folder)},
        "data": {"train": "unused"},
        "rollout": {"max_response_tokens": min(MAX_TOKENS, longest)},
    }
    for override in overrides:
        apply_override(tree, override)
    return parse_recipe(tree, str(folder))


def _identity(folder: Path) -> dict[str, Any]:
    """Return a model's place, and the sizes and times of its files."""
    files = sorted(file for file in folder.iterdir() if file.is_file())
    stamps = [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]
    return {"model": str(folder), "files": stamps}
