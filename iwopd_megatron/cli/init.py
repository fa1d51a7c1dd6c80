"""`iwopd init`: a new folder with a recipe to start from."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from iwopd_megatron.config.starter import write_demo, write_starter
from iwopd_megatron.errors import RecipeError

Folder = Annotated[Path, typer.Argument(metavar="DIR", help="new or empty folder")]


def init(
    folder: Folder,
    student: Annotated[
        Path | None, typer.Option(help="Hugging Face folder of the model that learns")
    ] = None,
    teacher: Annotated[
        Path | None, typer.Option(help="Hugging Face folder of the model that scores")
    ] = None,
    data: Annotated[Path | None, typer.Option(help="JSONL of problems")] = None,
    demo: Annotated[
        bool, typer.Option("--demo", help="a tiny pair of models, with its data, for 2 processes")
    ] = False,
) -> None:
    """Write a recipe to start from, every required key explained, into a new folder."""
    if demo and not (student is teacher is data is None):
        raise RecipeError("--demo has models and data of its own; leave out the other options.")
    written = write_demo(folder) if demo else write_starter(folder, student, teacher, data)
    for path in written:
        print(f"wrote {path}")
    train = "iwopd train recipe.yaml"
    if not demo and (student is None or teacher is None or data is None):
        train = "name your models and data in recipe.yaml, then " + train
    print(f"next: cd {folder}; {train}")
