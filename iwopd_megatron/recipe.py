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
from iwopd_megatron.preflight_scorers import check_scorers


def load_recipe(path: Path, overrides: list[str] = ()) -> Recipe:
    """Read YAML, apply `a.b=value` overrides (YAML syntax), and check everything checkable."""
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
    for override in overrides:
        apply_override(tree, override)
    recipe = parse_recipe(tree, str(path))
    check(recipe)
    check_scorers(recipe)
    return recipe


def parse_recipe(tree: dict[str, Any], where: str) -> Recipe:
    """Validate types and key names; the first problem becomes a RecipeError."""
    try:
        return Recipe.model_validate(tree)
    except ValidationError as error:
        raise RecipeError(f"{where}: {_sentence(error.errors()[0])}") from None


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


def _sentence(error: dict[str, Any]) -> str:
    path = [str(part) for part in error["loc"]]
    key = ".".join(path)
    if error["type"] == "extra_forbidden":
        annotation: Any = Recipe
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
        return f"'{key}' is missing; add it to the recipe or write {key}=... on the command line."
    return f"'{key}' is {error.get('input')!r}: {error['msg'][0].lower()}{error['msg'][1:]}."


def _section_class(annotation: Any) -> type[BaseModel]:
    options = getattr(annotation, "__args__", (annotation,))
    return next(o for o in options if isinstance(o, type) and issubclass(o, BaseModel))
