"""Problems from JSONL, prompts as token ids, an order that is a function of seed and cursor."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from iwopd_megatron.errors import RecipeError


@dataclass(frozen=True)
class Problem:
    """One line of a data file; `response` only where a model is fine-tuned on it."""

    question: str
    answer: str
    difficulty: float
    source: str
    response: str | None = None


def read_problems(path: Path, need_response: bool = False) -> list[Problem]:
    """All lines of a JSONL file; the first bad one is a sentence with file and line."""
    problems: list[Problem] = []
    try:
        # only "\n" ends a line: JSON strings may hold other line separators as they are
        lines = path.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise RecipeError(
            f"{path} is not UTF-8: byte {error.start}; re-save it as UTF-8."
        ) from None
    if lines[-1] == "":
        lines.pop()
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except ValueError:
            raise RecipeError(
                f"{path} line {number} is not JSON; each line holds one object."
            ) from None
        wanted = ["question", "answer", "difficulty", "source"] + ["response"] * need_response
        missing = [key for key in wanted if not isinstance(row, dict) or key not in row]
        if missing:
            raise RecipeError(
                f"{path} line {number} lacks '{missing[0]}'; a line needs {', '.join(wanted)}."
            )
        problems.append(_problem(row, f"{path} line {number}"))
    if not problems:
        raise RecipeError(f"{path} is empty; it needs one JSON object a line.")
    return problems


def _problem(row: dict[str, Any], where: str) -> Problem:
    for key in ("question", "source"):
        if not isinstance(row[key], str) or not row[key]:
            raise RecipeError(f"{where}: {key} {row[key]!r} is not a text.")
    if not isinstance(row.get("response", ""), str):
        raise RecipeError(f"{where}: response {row['response']!r} is not a text.")
    try:
        difficulty = float(row["difficulty"])
    except (TypeError, ValueError):
        raise RecipeError(f"{where}: difficulty {row['difficulty']!r} is not a number.") from None
    return Problem(
        row["question"], str(row["answer"]), difficulty, row["source"], row.get("response")
    )


def encode_prompt(tokenizer: Any, question: str) -> list[int]:
    """Chat template (no thinking) where the tokenizer has one, the plain question otherwise."""
    if tokenizer.chat_template:
        return tokenizer.apply_chat_template(
            [{"role": "user", "content": question}],
            add_generation_prompt=True,
            enable_thinking=False,
            return_dict=False,
        )
    return tokenizer.encode(question, add_special_tokens=False)


def encode_problems(
    tokenizer: Any, problems: list[Problem], limit: int
) -> list[tuple[Problem, list[int]]]:
    """The problems whose prompts have at most `limit` tokens, with those tokens; none is cut."""
    encoded = [(problem, encode_prompt(tokenizer, problem.question)) for problem in problems]
    return [(problem, ids) for problem, ids in encoded if len(ids) <= limit]


class PromptOrder:
    """An endless order: every epoch permuted anew (or in file order). `cursor` is all its state."""

    def __init__(self, count: int, seed: int, shuffle: bool = True):
        self.count, self.seed, self.shuffle = count, seed, shuffle
        self.cursor = 0
        self._epoch: tuple[int, list[int]] = (-1, [])

    def take(self, number: int) -> list[int]:
        """The next `number` problem indices."""
        taken = [self._at(self.cursor + i) for i in range(number)]
        self.cursor += number
        return taken

    def _at(self, position: int) -> int:
        epoch, place = divmod(position, self.count)
        if self._epoch[0] != epoch:
            order = list(range(self.count))
            if self.shuffle:
                random.Random(f"{self.seed}-{epoch}").shuffle(order)
            self._epoch = (epoch, order)
        return self._epoch[1][place]
