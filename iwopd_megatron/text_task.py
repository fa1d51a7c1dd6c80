"""A task in real language for a small instruction model: short questions, and open instructions.

Prompts are drawn from the wordings and tables of text_task.yaml as a function of the seed. Values
(numbers, entries of a table, topics) are held out or trained on by a hash of them, whatever the
seed, so that no training prompt of any seed has the values of a held-out one of its kind; each kind
has wordings, too, that only held-out prompts use. Same JSONL schema as the real data sets; a column
`template` says which wording made a row.

A question's reference answer has one of these forms, and is graded by it:
    `19`, `19 (given 7 12)`   the last number of the response that the question does not give
    `yes / no`                the first of these that the response names is the first of them
    `ant, bear, cat`          these words, where the response names each last, in this order
    `Paris`                   the response names it
An open instruction has no answer. Its reference says what a response on its topic mentions,
`cat, dog / puppy`: all between commas, any between slashes.
"""

from __future__ import annotations

import random
import re
import zlib
from collections.abc import Iterator
from itertools import chain, count, islice
from pathlib import Path
from typing import Any, NamedTuple

from iwopd_megatron.errors import RecipeError
from iwopd_megatron.text_values import DRAW, Values, tables
from iwopd_megatron.toy_task import write_jsonl

SHORT, OPEN = "short_answer", "open_instruction"  # sources of the rows, and names of their graders
TRAIN, HELD_OUT, HELD_OUT_OPEN = 480, 120, 60  # prompts; every second one of TRAIN is open
HELD_OUT_SHARE = 5  # one in so many values
NEW_VALUES = 50  # draws for values that no row of the kind has yet
DRAWS = 5000  # for a question that no row is yet
NUMBER_WORDS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen "
    "sixteen seventeen eighteen nineteen twenty"
).split()
NUMBER = re.compile(r"\d+(?:,\d{3})*(?:\.\d+)?")
FIGURES = re.compile(r"(\d+)(?: \(given ([\d ]+)\))?")
Row = dict[str, Any]


def is_right(response: str, answer: str) -> bool:
    """Return whether a response gives a question's reference answer, in the forms above."""
    if figures := FIGURES.fullmatch(answer):
        given = {float(number) for number in (figures[2] or "").split()}
        found = [number for number in _numbers(response) if number not in given]
        return found[-1:] == [float(figures[1])]
    if "," in answer:
        wanted = answer.lower().split(", ")
        return _named(response, wanted)[-len(wanted) :] == wanted
    choices = answer.lower().split(" / ")
    return _named(response, choices)[:1] == choices[:1]


def is_on_topic(response: str, answer: str) -> bool:
    """Return whether a response mentions what an open instruction is about."""
    return all(
        any(re.search(rf"\b{re.escape(word)}", response, re.IGNORECASE) for word in one)
        for one in (either.split(" / ") for either in answer.split(", "))
    )


def check_reference(answer: str) -> None:
    """Refuse a reference answer with nothing between its commas or slashes; RecipeError."""
    if not all(re.search(r"\w", part) for part in re.split(r",| / ", answer)):
        raise RecipeError(f"answer {answer!r:.80} says nothing at one place; write a word there.")


def _numbers(text: str) -> list[float]:
    """Return the numbers of a text in their order; those in words only where it has no figures."""
    if figures := NUMBER.findall(text):
        return [float(number.replace(",", "")) for number in figures]
    words = re.findall(r"[a-z]+", text.lower())
    return [float(NUMBER_WORDS.index(word)) for word in words if word in NUMBER_WORDS]


def _named(text: str, words: list[str]) -> list[str]:
    """Return which of these words, in small letters, a text names; in the text's order."""
    either = "|".join(re.escape(word) for word in words)
    return re.findall(rf"(?<!\w['’])(?<!\w)(?:{either})(?!\w)", text.lower())


def is_held_out(key: str) -> bool:
    """Return whether values are held out, whatever the seed. key: of their kind and of them."""
    return zlib.crc32(key.encode()) % HELD_OUT_SHARE == 0


def short_rows(seed: int, held_out: bool = False) -> Iterator[Row]:
    """Yield lines of questions that can be graded, one kind after the other, without end."""
    return _rows("checkable", SHORT, f"{seed}-{held_out}", held_out)


def open_rows(seed: int, held_out: bool = False) -> Iterator[Row]:
    """Yield lines of open instructions, one kind after the other, without end."""
    return _rows("open", OPEN, f"{seed}-{held_out}", held_out)


def _rows(group: str, source: str, seed: str, held_out: bool) -> Iterator[Row]:
    """Yield rows of a group's kinds in turn, until no kind has another question."""
    rng = random.Random(f"{group}-{seed}")
    questions: set[str] = set()
    keys: set[str] = set()
    for turn in count():
        before = len(questions)
        for name, kind in tables()[group].items():
            if turn % kind.get("every", 1):
                continue
            template, wording = _wording(name, kind, turn // kind.get("every", 1), held_out)
            for draw in range(DRAWS):
                values = DRAW[name](rng)
                key, question = f"{name} {values.key}", _question(wording, values, kind, rng)
                answer = _reference(values.answer, question)
                is_known = question in questions or (key in keys and draw < NEW_VALUES)
                if answer is not None and is_held_out(key) == held_out and not is_known:
                    questions.add(question)
                    keys.add(key)
                    row = {"question": question, "answer": answer, "source": source}
                    yield row | {"difficulty": kind.get("steps", 1), "template": template}
                    break
        if len(questions) == before:
            return


def _wording(name: str, kind: Row, turn: int, held_out: bool) -> tuple[str, str]:
    """Return (template, wording) of a turn; held-out prompts have unseen ones every second time."""
    is_unseen = held_out and turn % 2 == 0
    wordings = kind["held_out" if is_unseen else "train"]
    place = turn // (1 + held_out) % len(wordings)
    return f"{name} {'unseen ' * is_unseen}{place + 1}", wordings[place]


def _question(wording: str, values: Values, kind: Row, rng: random.Random) -> str:
    """Return a wording with its values, names and things in it, and how to answer."""
    name, other = rng.sample(tables()["names"], 2)
    others = {key: rng.choice(tables()[key]) for key in ("things", "boxes", "places")}
    fields = {"name": name, "other": other, **others, "place": others["places"]} | values.fields
    question = wording.format(**fields)
    return f"{question} {rng.choice(tables()['how'][kind['how']])}" if "how" in kind else question


def _reference(answer: str, question: str) -> str | None:
    """Return a reference answer that knows the question's numbers; None if its own is among them.

    Such a question is not asked: whether a response answers it or repeats it could not be told.
    """
    given = sorted(set(re.findall(r"\d+", question)), key=int)
    if not answer.isdigit() or not given:
        return answer
    return None if answer in given else f"{answer} (given {' '.join(given)})"


def write_task(folder: Path, seed: int = 1) -> dict[str, list[Row]]:
    """Write train.jsonl, eval.jsonl (questions only) and eval_open.jsonl; return them by name."""
    half = TRAIN // 2
    pairs = zip(short_rows(seed), open_rows(seed), strict=False)
    files = {
        "train": list(islice(chain.from_iterable(pairs), 2 * half)),
        "eval": list(islice(short_rows(seed, held_out=True), HELD_OUT)),
        "eval_open": list(islice(open_rows(seed, held_out=True), HELD_OUT_OPEN)),
    }
    for name, rows in files.items():
        write_jsonl(folder / f"{name}.jsonl", iter(rows))
    return files


class Variety(NamedTuple):
    """How varied rows are: counts, and lengths in words of a question."""

    rows: int
    gradable: int
    templates: int
    beginnings: int  # different first five words
    shortest: int
    median: int
    longest: int


def variety(rows: list[Row]) -> Variety:
    """Return how varied rows are; there must be one."""
    words = sorted(len(row["question"].split()) for row in rows)
    return Variety(
        rows=len(rows),
        gradable=sum(row["source"] == SHORT for row in rows),
        templates=len({row["template"] for row in rows}),
        beginnings=len({tuple(row["question"].split()[:5]) for row in rows}),
        shortest=words[0],
        median=words[len(words) // 2],
        longest=words[-1],
    )
