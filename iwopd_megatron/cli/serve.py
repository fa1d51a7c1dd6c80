"""`iwopd serve-teacher`: run a recipe's teacher as a scoring server."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from iwopd_megatron.config.load import load_recipe
from iwopd_megatron.config.models import Service, Teacher
from iwopd_megatron.config.recipe import Recipe
from iwopd_megatron.errors import RecipeError
from iwopd_megatron.runtime.quiet import quiet


def serve_teacher(
    recipe: Annotated[Path, typer.Argument(help="recipe YAML")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="key=value, e.g. teacher.service.parallel.tp=8")
    ] = None,
    source: Annotated[str, typer.Option(help="which of the recipe's teachers")] = "",
    host: Annotated[str | None, typer.Option(help="address to listen on")] = None,
    port: Annotated[int | None, typer.Option(min=0, max=65535, help="0: a free one")] = None,
) -> None:
    """Score sequences over HTTP, as SGLang's /generate does, on a Megatron world of its own."""
    loaded = load_recipe(recipe, overrides or [])
    teacher = choose_teacher(loaded, source, recipe)
    given = {"host": host, "port": port}
    changes = {name: value for name, value in given.items() if value is not None}
    service = (teacher.service or Service()).model_copy(update=changes)
    quiet()
    from iwopd_megatron.cli import worker
    from iwopd_megatron.teacher.service import serve

    sys.exit(worker.execute(service.world, serve, (teacher, service)))


def choose_teacher(recipe: Recipe, source: str, where: Path) -> Teacher:
    """Return the teacher of this source, or the only one; RecipeError where there is none."""
    if recipe.teacher is not None and not source:
        return recipe.teacher
    if not recipe.is_distilling:
        raise RecipeError(f"{where} has no teacher to serve; add teacher.hf.")
    if source not in recipe.teachers:
        known = ", ".join(sorted(recipe.teachers)) or "none: leave --source out"
        raise RecipeError(f"--source '{source}' is not a teacher of {where}; known: {known}.")
    return recipe.teachers[source]
