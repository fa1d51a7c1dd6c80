"""Read a recipe: YAML plus dotted overrides, checked up front.

Imports no torch, so a wrong recipe is refused at once. A problem is one `RecipeError` sentence that
names the key and says what to write instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from iwopd_megatron.config.explain import explain
from iwopd_megatron.config.preflight import check
from iwopd_megatron.config.preflight_rollout import check_rollout
from iwopd_megatron.config.preflight_scorers import check_scorers
from iwopd_megatron.config.recipe import Recipe
from iwopd_megatron.errors import RecipeError
from iwopd_megatron.files.shipped import (
    find_recipe,
    here_or_shipped,
    is_bare,
    nearest_recipes,
)
from iwopd_megatron.files.yaml_file import parse_yaml, read_yaml

Root = TypeVar("Root", bound=BaseModel)
READ = ("hf", "path", "train", "eval")  # keys whose paths may be those of shipped files


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Return the recipe of a YAML file with `a.b=value` overrides (YAML syntax), checked.

    RecipeError for the first thing that cannot run, in its models' folders too.
    """
    recipe = read_recipe(path, overrides)
    check(recipe)
    check_scorers(recipe)
    check_rollout(recipe)
    return recipe


def read_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Return the recipe as `load_recipe` does, without a look at models and data.

    For planning on a machine that has neither.
    """
    path = find_recipe(path)
    tree = _read_tree(path)
    base = tree.pop("extends", None)
    if base is not None:
        tree = _merge(_read_base(path, base), tree)
    for override in overrides:
        apply_override(tree, override)
    return parse_recipe(_with_shipped(tree), str(path))


def _with_shipped(tree: Any) -> Any:
    """Return the tree with shipped files in the place of recipes/... paths that are not here."""
    if isinstance(tree, list):
        return [_with_shipped(value) for value in tree]
    if not isinstance(tree, dict):
        return tree
    return {key: _with_shipped_value(key, value) for key, value in tree.items()}


def _with_shipped_value(key: str, value: Any) -> Any:
    if key in READ and isinstance(value, str) and value.startswith("recipes/"):
        return str(here_or_shipped(Path(value)))
    return _with_shipped(value)


def _read_base(path: Path, base: Any) -> dict[str, Any]:
    """Return the tree of the file that a recipe's `extends: other.yaml` names, beside it."""
    if not isinstance(base, str):
        raise RecipeError(f"recipe {path}: 'extends' is {base!r}; name one YAML file beside it.")
    tree = _read_tree(path.parent / base)
    if "extends" in tree:
        raise RecipeError(
            f"recipe {path} extends {base}, which itself extends {tree['extends']}; "
            "one level is allowed: extend the last one."
        )
    return tree


def _merge(base: dict[str, Any], tree: dict[str, Any]) -> dict[str, Any]:
    """Return `base` with the values of `tree`, section by section; lists and null replace."""
    merged = dict(base)
    for key, value in tree.items():
        both = isinstance(value, dict) and isinstance(base.get(key), dict)
        merged[key] = _merge(base[key], value) if both else value
    return merged


def _read_tree(path: Path) -> dict[str, Any]:
    remedy = "recipes ship in recipes/, e.g. recipes/demo_tiny_moe.yaml"
    if is_bare(path) and not path.suffix:
        *names, last = nearest_recipes(path.name)
        remedy = f"the shipped recipes with the nearest names are {', '.join(names)} and {last}"
    return read_yaml(path, "recipe", remedy)


def parse_recipe(tree: dict[str, Any], where: str) -> Recipe:
    """Return a tree as a recipe; RecipeError, beginning with `where`, for an unfit key or value."""
    return parse_tree(tree, Recipe, where)


def parse_answering_recipe(tree: dict[str, Any], where: str) -> Recipe:
    """Return a tree as a recipe of which only the rollouts run: its engine and servers are checked.

    RecipeError as `parse_recipe`, and for what the engine cannot do.
    """
    recipe = parse_recipe(tree, where)
    check_rollout(recipe)
    return recipe


def parse_tree(tree: dict[str, Any], root: type[Root], where: str, is_recipe: bool = True) -> Root:
    """Return a tree of settings as `root`; RecipeError for the first unfit key or value.

    is_recipe: the command line can set its keys, which the sentence then says.
    """
    try:
        return root.model_validate(tree)
    except ValidationError as error:
        raise RecipeError(f"{where}: {explain(error, root, is_recipe)}") from None


def apply_override(tree: dict[str, Any], override: str) -> None:
    """Set one key of a recipe's tree from `a.b=value`; RecipeError if it is no such thing."""
    key, equals, value = override.partition("=")
    *parents, leaf = key.split(".")
    if not equals or not all([*parents, leaf]):
        raise RecipeError(f"override '{override}' is not key=value; write e.g. train.lr=3e-4.")
    for parent in parents:
        if tree.get(parent) is None:
            tree[parent] = {}
        tree = tree[parent]
        if not isinstance(tree, dict):
            raise RecipeError(f"override '{override}': '{parent}' holds a value, not a section.")
    try:
        tree[leaf] = parse_yaml(value)
    except ValueError as error:
        raise RecipeError(
            f"override '{override}': cannot read '{value}' as a YAML value ({error})."
        ) from None
