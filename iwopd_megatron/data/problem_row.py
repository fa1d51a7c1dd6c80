"""From a row of a data set to a `Problem`. Whatever is wrong with it is one sentence that names it.

Columns are reached by name, inside of others by dots; WHOLE is the row itself.
"""

from __future__ import annotations

import json
import math
from typing import Any

from iwopd_megatron.config.data import Source
from iwopd_megatron.data.conversation import Conversation, is_written_out, read_conversation
from iwopd_megatron.data.problems import Problem
from iwopd_megatron.errors import RecipeError

FIELDS = ("question", "answer", "difficulty", "source", "response")
WHOLE = "*"  # as a column: the row as it is


def read_problem(
    row: dict[str, Any], where: str, source: Source, need_response: bool = False
) -> Problem:
    """Return the problem of a row; RecipeError, beginning with its place `where`, if it is unfit.

    need_response: it must have a response to fine-tune on, and may have a blank answer.
    """
    fields = _mapped(row, where, source)
    asked = _asked(fields["question"], where)
    _check_text(fields["source"], f"{where}: source")
    return Problem(
        asked.question,
        _answer(fields["answer"], where, may_be_blank=need_response),
        _difficulty(fields["difficulty"], where, source),
        fields["source"],
        _response(fields["response"], asked.response, where, source, need_response),
        source.grader,
        source.prefix,
        source.suffix,
        asked.before,
        asked.after,
        where,
        asked.response is not None,
    )


def value_at(row: Any, key: str) -> Any:
    """Return the value at a dotted key, the row itself at WHOLE; None if there is none."""
    if key == WHOLE:
        return row
    for part in key.split("."):
        if not isinstance(row, dict) or part not in row:
            return None
        row = row[part]
    return row


def _is_native(source: Source) -> bool:
    """Return whether a source's rows have this package's columns: no mapping, name or source."""
    return not (source.columns or source.name or source.source)


def _mapped(row: dict[str, Any], where: str, source: Source) -> dict[str, Any]:
    """Return a row's fields by their names in `Problem`; RecipeError where a needed one lacks."""
    needed = ["question", "answer"]
    if source.source is None:
        needed.append("source")
    if source.min_difficulty is not None or _is_native(source):
        needed.append("difficulty")
    out = {field: value_at(row, source.columns.get(field, field)) for field in FIELDS}
    for field in needed:
        column = source.columns.get(field, field)
        if out[field] is None and (column not in row):
            names = ", ".join(source.columns.get(name, name) for name in needed)
            found = ", ".join(map(str, row))[:200] or "nothing"
            raise RecipeError(
                f"{where} lacks '{column}'; a line needs {names}, this one has {found}; name other "
                "columns in the source's 'columns'."
            )
    return out | ({"source": source.source} if source.source is not None else {})


def _asked(question: Any, where: str) -> Conversation:
    """Return the messages of a question column: a text is the only one."""
    if isinstance(question, list):
        asked = read_conversation(question, where)
    else:
        asked = Conversation((), question, (), None)
    _check_text(asked.question, f"{where}: question")
    if is_written_out(asked.question):
        raise RecipeError(
            f"{where}: question is a text that holds a list of messages; write the list itself."
        )
    for message in (*asked.before, *asked.after):
        _check_text(message["content"], f"{where}: a message's text", may_be_blank=True)
    return asked


def _check_text(value: Any, what: str, may_be_blank: bool = False) -> None:
    """Refuse what is not a text that a tokenizer and a file can take; RecipeError names `what`."""
    if not isinstance(value, str):
        raise RecipeError(f"{what} {value!r:.80} is not a text.")
    if not (may_be_blank or value.strip()):
        raise RecipeError(f"{what} is empty.")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise RecipeError(
            f"{what} has half a character at {error.start}, a surrogate without its other; "
            "write the character."
        ) from None


def _response(
    given: Any, said: str | None, where: str, source: Source, is_needed: bool
) -> str | None:
    """Return the response: the column's, or what an assistant said last; None without one."""
    if given is not None and said is not None and given != said:
        raise RecipeError(
            f"{where} has a response and ends with another of an assistant's; keep one of them."
        )
    response = said if given is None else given
    if response is None and is_needed:
        raise RecipeError(
            f"{where} lacks '{source.columns.get('response', 'response')}', which fine-tuning "
            "needs; add it, or let the messages end with the assistant's."
        )
    if response is not None:
        _check_text(response, f"{where}: response", may_be_blank=not is_needed)
    return response


def _answer(answer: Any, where: str, may_be_blank: bool) -> str:
    """Return the reference answer as a text; objects and lists as JSON."""
    if answer is None:
        raise RecipeError(f"{where}: answer is null.")
    if isinstance(answer, float) and not math.isfinite(answer):
        raise RecipeError(f"{where}: answer is {answer}, not a number; write what is right.")
    if isinstance(answer, (dict, list)):
        return json.dumps(answer, default=str)  # Parquet has dates
    _check_text(str(answer), f"{where}: answer", may_be_blank)
    return str(answer)


def _difficulty(value: Any, where: str, source: Source) -> float:
    is_needed = source.min_difficulty is not None or _is_native(source)
    if value is None and not is_needed:
        return 0.0
    try:
        difficulty = float(value)
    except (TypeError, ValueError, OverflowError):
        difficulty = math.nan
    if not math.isfinite(difficulty):
        raise RecipeError(f"{where}: difficulty {value!r:.80} is not a number.")
    return difficulty
