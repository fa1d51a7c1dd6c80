"""`iwopd data`: what a recipe would train on, before anything is trained."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from iwopd_megatron.config.data import Data
from iwopd_megatron.config.load import load_recipe
from iwopd_megatron.data.problems import MixedOrder
from iwopd_megatron.data.prompts import load_tokenizer
from iwopd_megatron.data.run_data import (
    check_problems,
    check_training,
    encode_evaluation,
    read_evaluation,
)
from iwopd_megatron.data.training_set import (
    Counts,
    TrainingSet,
    encode_rows,
    read_training_rows,
)
from iwopd_megatron.hf.answer_end import check_answer_end
from iwopd_megatron.runtime.quiet import quiet

RecipePath = Annotated[Path, typer.Argument(help="recipe YAML")]
SHOWN = 3
PERCENTILES = (50, 90, 99, 100)


def data(
    recipe: RecipePath,
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value")] = None,
) -> None:
    """Print what a recipe trains on: counts, lengths, what is left out, three prompts."""
    quiet()
    loaded = load_recipe(recipe, overrides or [])
    rows = read_training_rows(loaded, examine=True)
    check_problems(loaded, rows.problems)
    evaluated = read_evaluation(loaded)
    tokenizer = load_tokenizer(loaded.student.hf)
    ends = check_answer_end(loaded.student.hf, tokenizer, not loaded.is_distilling)
    found = encode_rows(loaded, rows, tokenizer)
    console = Console(width=None if sys.stdout.isatty() else 140, highlight=False)
    limit = loaded.rollout.max_prompt_tokens
    console.print(_counts(found.counts, limit))
    _explain(console, loaded.data)
    for note in ends + check_training(loaded, found, tokenizer):
        console.print(f"note: {escape(note)}", soft_wrap=True)
    encode_evaluation(loaded, *evaluated, tokenizer)
    order = found.order(loaded.train.seed, loaded.data.shuffle)
    a_round = loaded.train.prompts_per_round
    console.print(
        f"{len(found.problems)} prompts, {a_round} a round: "
        f"{loaded.train.rounds} rounds are {_passes(found, a_round * loaded.train.rounds)}."
    )
    for number, place in enumerate(order.take(min(SHOWN, len(found.problems))), 1):
        problem, ids = found.problems[place]
        console.rule(f"prompt {number}: {problem.source}, {len(ids)} tokens", align="left")
        console.print(escape(tokenizer.decode(ids)), soft_wrap=True)
        console.print(f"[dim]answer: {escape(_short(problem.answer))}[/dim]", soft_wrap=True)


def _counts(all_counts: list[Counts], limit: int) -> Table:
    """Return the table of problems, a row a source. limit: tokens of a prompt."""
    import numpy

    table = Table(title="problems", title_justify="left")
    headings = [
        "source",
        "rows",
        "too easy",
        "duplicate",
        "contaminated",
        f"> {limit} tokens",
        "kept",
    ]
    headings += [f"p{p}" if p < 100 else "longest" for p in PERCENTILES]
    for i, heading in enumerate(headings):
        table.add_column(heading, justify="right" if i else "left", overflow="fold")
    for counts in all_counts:
        lengths = numpy.percentile(counts.lengths or [0], PERCENTILES, method="higher")
        figures = [counts.rows, counts.easy, counts.duplicate, counts.contaminated, counts.too_long]
        table.add_row(counts.title, *map(str, [*figures, counts.kept, *map(int, lengths)]))
    return table


def _explain(console: Console, data: Data) -> None:
    """Print what the columns mean, and which of the rows they count have been taken out."""
    removed = {True: "removed", False: "kept"}
    held_out = [str(name) for name in [data.eval, *data.held_out] if name is not None]
    places = ", ".join(held_out) or "nothing, for data.eval and data.held_out are empty"
    console.print(
        "p50 to longest: tokens of a prompt with its template, before the limit.\n"
        f"Duplicates are {removed[data.remove_duplicates]} (data.remove_duplicates), contaminated "
        f"ones {removed[data.remove_contaminated]} (data.remove_contaminated); "
        f"contaminated: 13 words in a row as in {places}.",
        soft_wrap=True,
    )


def _passes(found: TrainingSet, prompts: int) -> str:
    """Return how often every problem is asked, in words."""
    order = found.order(0, False)
    if not isinstance(order, MixedOrder):
        return f"{prompts / len(found.problems):.2f} passes over them"
    parts = [
        f"{prompts * quota / order.BLOCK / counts.kept:.2f} over {counts.title} ({quota} %)"
        for quota, counts in zip(order.quotas, found.counts, strict=True)
    ]
    return "passes of " + ", ".join(parts)


def _short(text: str, most: int = 200) -> str:
    return text if len(text) <= most else f"{text[:most]} ... ({len(text)} characters)"
