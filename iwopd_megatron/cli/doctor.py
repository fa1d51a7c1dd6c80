"""`iwopd doctor`: what a recipe minimises, or what this machine has, before anything is trained."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from iwopd_megatron.config import doctor
from iwopd_megatron.config.load import load_recipe
from iwopd_megatron.data.prompts import load_tokenizer
from iwopd_megatron.data.training_set import load_training_set
from iwopd_megatron.hf.answer_end import check_answer_end
from iwopd_megatron.runtime import versions


def examine(
    recipe: Annotated[
        Path | None, typer.Argument(help="a recipe file or the name of a shipped one")
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Argument(help="key=value, e.g. train.lr=3e-4")
    ] = None,
) -> None:
    """Say what a recipe minimises, and which of its settings do nothing or not what they say.

    Without a recipe: this machine's versions against those that were tested.
    """
    if recipe is None:
        Console().print(_versions())
        return
    loaded = load_recipe(recipe, overrides or [])
    print(f"objective: {doctor.objective_line(loaded)}.")
    tokenizer = load_tokenizer(loaded.student.hf)
    ends = check_answer_end(loaded.student.hf, tokenizer, is_taught=not loaded.is_distilling)
    found = load_training_set(loaded, tokenizer)
    limit, dropped = loaded.rollout.max_prompt_tokens, found.too_long
    kept = len(found.problems)
    print(f"data: {kept} prompts of at most {limit} tokens, {dropped} longer ones left out.")
    notes = doctor.findings(loaded) + ends + found.notes
    for note in notes + doctor.long_prompts(dropped, kept + dropped, limit):
        print(f"note: {note}")


def _versions() -> Table:
    """Return the table of this machine's versions and what is known of them."""
    table = Table()
    for heading in ("", "here", "", "tested", "asked for"):
        table.add_column(heading, no_wrap=heading in ("", "here"))
    for support in versions.all_support():
        here = versions.installed(support.distribution)
        wanted = str(versions.required(support.distribution))
        table.add_row(
            support.name, here or "-", support.status(here), ", ".join(support.tested), wanted
        )
    return table
