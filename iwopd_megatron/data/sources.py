"""Rows of problems from JSONL, Parquet, folders of either, and datasets of the Hugging Face hub.

Columns are mapped to the names of `Problem`; the known sets bring their mapping along. A question
is a text or a list of messages. Whatever is wrong with a row is one sentence that names it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from iwopd_megatron.config.data import Source
from iwopd_megatron.config.recipe import Recipe
from iwopd_megatron.data.problem_row import FIELDS, WHOLE, read_problem, value_at
from iwopd_megatron.data.problems import Problem
from iwopd_megatron.errors import RecipeError
from iwopd_megatron.files.jsonl import Row, read_jsonl
from iwopd_megatron.grading.graders import check_answer
from iwopd_megatron.grading.math.grader import SUFFIX

KNOWN: dict[str, dict[str, Any]] = {
    "deepmath": {
        "name": "zwhe99/DeepMath-103K",
        "columns": {"answer": "final_answer"},
        "source": "math",
        "min_difficulty": 6.0,
        "suffix": SUFFIX,
    },
    "eurus_code": {
        "name": "PRIME-RL/Eurus-2-RL-Data",
        "where": {"ability": "code"},
        "source": "code",
        "columns": {"question": "prompt", "answer": "reward_model.ground_truth"},
    },
    "evalplus": {
        "columns": {"question": "prompt", "answer": WHOLE},
        "source": "code",
        "prefix": "Please provide a self-contained Python script that solves the following "
        "problem in a markdown code block:\n```\n",
        "suffix": "\n```",
    },
}


def resolve(source: Source) -> Source:
    """Return the source with what its known name implies; keys that are given win."""
    known = KNOWN.get(source.name or "")
    if known is None:
        return source
    given = {key: getattr(source, key) for key in source.model_fields_set - {"name"}}
    return Source.model_validate(known | given)


def check_sources(recipe: Recipe, sources: Iterable[str]) -> None:
    """Refuse kinds of problems that no teacher scores; RecipeError names the first.

    sources: the `source` of every problem.
    """
    missing = sorted(set(sources) - recipe.teachers.keys()) if recipe.teachers else []
    if missing:
        raise RecipeError(
            f"data.train has problems of source '{missing[0]}', but there are teachers "
            f"only for {', '.join(sorted(recipe.teachers))}; add teachers.{missing[0]}."
        )


def read_source(source: Source, need_response: bool = False) -> tuple[list[Problem], int, int]:
    """Return (problems, rows read, rows of them that are too easy) of a resolved source.

    need_response: rows must have a response to fine-tune on. RecipeError for the first unfit row,
    and for a source without problems.
    """
    problems, easy, count = [], 0, 0
    for where, row in read_rows(source):
        if any(value_at(row, key) != value for key, value in source.where.items()):
            continue
        count += 1
        problem = read_problem(row, where, source, need_response)
        if problem.answer.strip():  # what a model is only fine-tuned on needs none
            check_answer(problem.grader, problem.answer, where)
        if source.min_difficulty is not None and problem.difficulty < source.min_difficulty:
            easy += 1
        else:
            problems.append(problem)
    if not problems:
        wanted = " and ".join(f"{key} is {value!r}" for key, value in source.where.items())
        if easy:
            wanted = f"difficulty is at least {source.min_difficulty:g}"
        raise RecipeError(
            f"{_place(source)} is empty; it needs one JSON object a line."
            if not wanted
            else f"{_place(source)} has no row where {wanted}; change the recipe's data.train."
        )
    return problems, count, easy


def _place(source: Source) -> str:
    return str(source.path or source.name)


def read_rows(source: Source) -> Iterator[Row]:
    """Yield all rows of a source, in order, each with its place."""
    if source.path is None:
        yield from _from_hub(source)
        return
    path = source.path
    if path.is_dir():
        files = sorted(f for f in path.rglob("*") if f.suffix in (".jsonl", ".parquet"))
        if not files:
            raise RecipeError(f"folder {path} holds neither .jsonl nor .parquet files.")
    elif path.is_file():
        files = [path]
    elif path.exists():
        raise RecipeError(f"{path} is neither a file nor a folder; name a .jsonl or .parquet file.")
    else:
        raise RecipeError(f"data file {path} does not exist; check the path in the recipe.")
    for file in files:
        yield from _parquet(file, source) if file.suffix == ".parquet" else read_jsonl(file)


def _parquet(file: Path, source: Source) -> Iterator[Row]:
    import pyarrow
    from pyarrow import parquet

    number = 0
    try:
        table = parquet.ParquetFile(file)
        columns = [name for name in table.schema_arrow.names if _is_wanted(name, source)]
        for batch in table.iter_batches(columns=columns, batch_size=1024):
            for row in batch.to_pylist():
                number += 1
                yield f"{file} row {number}", row
    except (pyarrow.ArrowException, OSError) as error:
        raise RecipeError(
            f"{file} cannot be read as Parquet after row {number}: {_first_line(error)}"
        ) from None


def _from_hub(source: Source) -> Iterator[Row]:
    import datasets

    try:
        rows = datasets.load_dataset(source.name, split=source.split)
    except Exception as error:  # no network, no such name, no such split: a type of its own each
        raise RecipeError(
            f"dataset {source.name} cannot be loaded ({_first_line(error)}); give its source a "
            "path to the files on this machine."
        ) from None
    columns = [name for name in rows.column_names if _is_wanted(name, source)]
    for number, row in enumerate(rows.select_columns(columns), 1):
        yield f"{source.name} row {number}", row


def _columns(source: Source) -> set[str]:
    """Return the top-level columns that are read; the others of a big file stay on disk."""
    mapped = [source.columns.get(field, field) for field in FIELDS]
    return {key.partition(".")[0] for key in [*mapped, *source.where]}


def _is_wanted(name: str, source: Source) -> bool:
    return WHOLE in _columns(source) or name in _columns(source)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
