"""Read a recipe: YAML plus dotted overrides, checked up front.

Imports no torch, so a wrong recipe is refused at once. A problem is one `RecipeError` sentence that
names the key and says what to write instead.
"""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from iwopd_megatron.config import Recipe
from iwopd_megatron.errors import RecipeError
from iwopd_megatron.preflight import check
from iwopd_megatron.preflight_rollout import check_rollout
from iwopd_megatron.preflight_scorers import check_scorers


def load_recipe(path: Path, overrides: list[str] = ()) -> Recipe:
    """Read YAML, apply `a.b=value` overrides (YAML syntax), and check everything checkable."""
    recipe = read_recipe(path, overrides)
    check(recipe)
    check_scorers(recipe)
    check_rollout(recipe)
    return recipe


def read_recipe(path: Path, overrides: list[str] = ()) -> Recipe:
    """`load_recipe` without looking at models and data: for planning away from the cluster."""
    tree = _read_tree(path)
    base = tree.pop("extends", None)
    if base is not None:
        tree = _merge(_read_base(path, base), tree)
    for override in overrides:
        apply_override(tree, override)
    return parse_recipe(tree, str(path))


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
    if not path.is_file():
        raise RecipeError(
            f"recipe {path} does not exist; "
            "recipes ship in recipes/, e.g. recipes/demo_tiny_moe.yaml."
        )
    try:
        tree = yaml.safe_load(path.read_text()) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(
            f"recipe {path} is not valid YAML: {' '.join(str(error).split())}."
        ) from None
    if not isinstance(tree, dict):
        raise RecipeError(
            f"recipe {path} must hold 'key: value' lines, not a {type(tree).__name__}."
        )
    return tree


def parse_recipe(tree: dict[str, Any], where: str) -> Recipe:
    """Validate types and key names; the first problem becomes a RecipeError."""
    try:
        return Recipe.model_validate(tree)
    except ValidationError as error:
        raise RecipeError(f"{where}: {explain(error)}") from None


def apply_override(tree: dict[str, Any], override: str) -> None:
    """Set one key of a recipe from `a.b=value`."""
    key, equals, value = override.partition("=")
    if not equals or not key:
        raise RecipeError(f"override '{override}' is not key=value; write e.g. train.lr=3e-4.")
    *parents, leaf = key.split(".")
    for parent in parents:
        if tree.get(parent) is None:
            tree[parent] = {}
        tree = tree[parent]
        if not isinstance(tree, dict):
            raise RecipeError(f"override '{override}': '{parent}' holds a value, not a section.")
    try:
        tree[leaf] = yaml.safe_load(value)
    except yaml.YAMLError:
        raise RecipeError(
            f"override '{override}': cannot read '{value}' as a YAML value."
        ) from None


def explain(invalid: ValidationError, root: type[BaseModel] = Recipe) -> str:
    """The first problem of a tree that is no `root`, in words."""
    error = invalid.errors()[0]
    path = [str(part) for part in error["loc"]]
    key = ".".join(path)
    if error["type"] == "extra_forbidden":
        annotation: Any = root
        for part in path[:-1]:
            if get_origin(annotation) in (dict, list):  # `part` is a key or a place in it
                annotation = get_args(annotation)[-1]
            else:
                annotation = _section_class(annotation).model_fields[part].annotation
        section = _section_class(annotation)
        close = difflib.get_close_matches(path[-1], section.model_fields, 1)
        hint = (
            f"did you mean '{close[0]}'?"
            if close
            else f"known keys: {', '.join(section.model_fields)}."
        )
        return f"unknown key '{key}'; {hint}"
    if error["type"] == "missing":
        where = " to the recipe or write {key}=... on the command line" if root is Recipe else ""
        return f"'{key}' is missing; add it{where.format(key=key)}."
    return f"'{key}' is {error.get('input')!r}: {error['msg'][0].lower()}{error['msg'][1:]}."


def _section_class(annotation: Any) -> type[BaseModel]:
    options = getattr(annotation, "__args__", (annotation,))
    return next(o for o in options if isinstance(o, type) and issubclass(o, BaseModel))
