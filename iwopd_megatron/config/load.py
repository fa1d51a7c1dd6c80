"""Read a recipe: YAML plus dotted overrides, checked up front.

Imports no torch, so a wrong recipe is refused at once. A problem is one `RecipeError` sentence that
names the key and says what to write instead.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import ValidationError

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

READ = ("hf", "path", "train", "eval")  # keys whose paths may be those of shipped files


def load_recipe(path: Path, overrides: list[str] = ()) -> Recipe:
    """Read YAML, apply `a.b=value` overrides (YAML syntax), and check everything checkable."""
    recipe = read_recipe(path, overrides)
    check(recipe)
    check_scorers(recipe)
    check_rollout(recipe)
    return recipe


def read_recipe(path: Path, overrides: list[str] = ()) -> Recipe:
    """`load_recipe` without looking at models and data: for planning away from the cluster."""
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
    """What a recipe's `extends: other.yaml` names, a file beside it."""
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
    """`base` with the values of `tree`, section by section; lists and null replace."""
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
    """Validate types and key names; the first problem becomes a RecipeError."""
    try:
        return Recipe.model_validate(tree)
    except ValidationError as error:
        raise RecipeError(f"{where}: {explain(error, Recipe)}") from None


def apply_override(tree: dict[str, Any], override: str) -> None:
    """Set one key of a recipe from `a.b=value`."""
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
