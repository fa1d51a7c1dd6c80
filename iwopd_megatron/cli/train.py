"""`iwopd train | sft | toy-task | text-task`: a run, and the demos' tasks."""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Annotated

import typer

from iwopd_megatron.config.load import load_recipe
from iwopd_megatron.config.recipe import Recipe
from iwopd_megatron.data.before_start import check_before_start
from iwopd_megatron.errors import RecipeError
from iwopd_megatron.files.lock import locked
from iwopd_megatron.files.outputs import check_folder
from iwopd_megatron.records.resume import check_start
from iwopd_megatron.runtime.quiet import quiet

RecipePath = Annotated[Path, typer.Argument(help="recipe YAML")]
Overrides = Annotated[list[str] | None, typer.Argument(help="key=value, e.g. train.lr=3e-4")]
Resume = Annotated[
    bool, typer.Option("--resume", help="go on from the newest checkpoint of the run folder")
]


def train(recipe: RecipePath, overrides: Overrides = None, resume: Resume = False) -> None:
    """Distil a student on-policy from a teacher."""
    loaded = load_recipe(recipe, overrides or [])
    if not loaded.is_distilling:
        raise RecipeError(
            f"{recipe} has no teacher; "
            "add teacher.hf, or use 'iwopd sft' to fine-tune on responses."
        )
    _train(loaded, resume)


def sft(recipe: RecipePath, overrides: Overrides = None, resume: Resume = False) -> None:
    """Fine-tune a model on given responses, through the same trainer."""
    loaded = load_recipe(recipe, overrides or [])
    if loaded.is_distilling:
        raise RecipeError(
            f"{recipe} has a teacher; use 'iwopd train', or remove the teacher section."
        )
    _train(loaded, resume)


def _train(recipe: Recipe, resume: bool) -> None:
    """Check that a run can start, run it in a world of its own, and exit with its code.

    Under torchrun this process is one rank; rank 0 keeps other runs out of the folder.
    """
    is_main = os.environ.get("RANK", "0") == "0"
    if is_main:
        check_folder(recipe.out, "out")
        if recipe.rollout.sync_folder is not None:
            check_folder(recipe.rollout.sync_folder, "rollout.sync_folder")
    check_start(recipe, resume)
    (data,) = check_before_start([recipe])
    with contextlib.ExitStack() as stack:
        if is_main:
            stack.enter_context(locked(recipe.out))
        worker = load_worker()
        worker.check_memory([recipe])
        sys.exit(worker.execute(recipe.world, worker.train, (recipe, resume, data)))


def toy_task(
    folder: Annotated[Path, typer.Argument(help="where to write")] = Path("runs/toy_task"),
) -> None:
    """Write the demo's task: data, tokenizer and the configurations of its two models."""
    check_folder(folder, "FOLDER")
    from iwopd_megatron.toy_task import write_task

    write_task(folder)
    print(f"wrote {folder}")


def text_task(
    folder: Annotated[Path, typer.Argument(help="where to write", metavar="OUT")],
    seed: Annotated[int, typer.Option(min=0, help="of the prompts that are drawn")] = 1,
) -> None:
    """Write short questions and open instructions in English: train, eval and eval_open.jsonl."""
    check_folder(folder, "OUT")
    from iwopd_megatron.text_task import variety, write_task

    for name, rows in write_task(folder, seed).items():
        found = variety(rows)
        print(
            f"wrote {folder / name}.jsonl: {found.rows} prompts, {found.gradable} with an answer; "
            f"{found.templates} templates, {found.beginnings} first five words, "
            f"{found.shortest} to {found.longest} words, median {found.median}"
        )


def load_worker() -> ModuleType:
    """Import `worker`, and with it torch, Megatron and transformers, without their warnings."""
    quiet()
    from iwopd_megatron.cli import worker

    return worker
