"""What fills the wordings of text_task.yaml in, and the answer: by kind of prompt, in `DRAW`."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import yaml

POLITE = "please / could / would / can you / kindly / may I"


@dataclass(frozen=True)
class Values:
    """What fills a wording in.

    key: what of it is held out or trained on; answer: a reference, in the forms of text_task.py.
    """

    key: str
    answer: str
    fields: dict[str, Any] = field(default_factory=dict)


Draw = Callable[[random.Random], Values]


@cache
def tables() -> dict[str, Any]:
    """Return the content of text_task.yaml."""
    file = Path(__file__).with_name("text_task.yaml")
    return dict(yaml.safe_load(file.read_text(encoding="utf-8")))


def _arithmetic(answer: Callable[..., int], *limits: tuple[int, int]) -> Draw:
    """Return what draws numbers a, b, ... within their limits, which `answer` takes."""

    def draw(rng: random.Random) -> Values:
        numbers = [rng.randint(*limit) for limit in limits]
        fields = dict(zip("abc", numbers, strict=False)) | {"product": math.prod(numbers)}
        return Values(_of_numbers(numbers), str(answer(*numbers)), fields)

    return draw


def _of_numbers(numbers: list[int]) -> str:
    """Return the key of numbers, whatever their order."""
    return " ".join(map(str, sorted(numbers)))


def _sequence(rng: random.Random) -> Values:
    first, step = rng.randint(1, 12), rng.randint(1, 10)
    *shown, last = (str(first + step * i) for i in range(5))
    return Values(f"{first} {step}", last, {"sequence": ", ".join(shown)})


def _larger(rng: random.Random) -> Values:
    a, b = rng.sample(range(1, 100), 2)
    return Values(_of_numbers([a, b]), f"{max(a, b)} / {min(a, b)}", {"a": a, "b": b})


def _who(rng: random.Random) -> Values:
    a, b = rng.sample(range(2, 30), 2)
    name, other = rng.sample(tables()["names"], 2)
    answer = f"{name} / {other}" if a > b else f"{other} / {name}"
    return Values(_of_numbers([a, b]), answer, {"a": a, "b": b, "name": name, "other": other})


def _count(rng: random.Random) -> Values:
    words = rng.sample(tables()["words"], rng.randint(3, 7))
    return Values(" ".join(sorted(words)), str(len(words)), {"list": ", ".join(words)})


def _of_word(answer: Callable[[str], str]) -> Draw:
    """Return what draws a word, of which `answer` asks something."""

    def draw(rng: random.Random) -> Values:
        # `a` and `i` would be named by every response
        word = rng.choice([word for word in tables()["words"] if word[0] not in "ai"])
        return Values(word, answer(word), {"word": word})

    return draw


def _units(rng: random.Random) -> Values:
    large, small, factor = rng.choice(tables()["units"])
    a = rng.randint(2, 9)
    return Values(f"{a} {large}", str(a * factor), {"a": a, "large": large, "small": small})


def _calendar(table: str, most: int) -> Draw:
    """Return what draws a day or month and another, at most `most` later."""

    def draw(rng: random.Random) -> Values:
        cycle = tables()[table]
        place, a = rng.randrange(len(cycle)), rng.randint(2, most)
        start, end = cycle[place], cycle[(place + a) % len(cycle)]
        wrong = [name for name in cycle if name not in (start, end)]
        return Values(f"{start} {a}", " / ".join([end, *wrong]), {"start": start, "a": a})

    return draw


def _entry(table: str) -> Draw:
    """Return what draws an entry of a table, whose answer is its other column."""

    def draw(rng: random.Random) -> Values:
        x, answer = rng.choice(list(tables()[table].items()))
        return Values(x, answer, {"x": x})

    return draw


def _which(rng: random.Random) -> Values:
    category, *others = rng.sample(list(tables()["categories"]), 3)
    right, *wrong = (rng.choice(tables()["categories"][name]) for name in (category, *others))
    return Values(right, " / ".join([right, *wrong]), _choices(rng, [right, *wrong], category))


def _odd(rng: random.Random) -> Values:
    category, other = rng.sample(list(tables()["categories"]), 2)
    right = rng.choice(tables()["categories"][other])
    wrong = rng.sample(tables()["categories"][category], 3)
    return Values(right, " / ".join([right, *wrong]), _choices(rng, [right, *wrong], category))


def _choices(rng: random.Random, words: list[str], category: str) -> dict[str, str]:
    *rest, last = rng.sample(words, len(words))
    return {"choices": f"{', '.join(rest)} or {last}", "category": category}


def _sort_words(rng: random.Random) -> Values:
    words = _shuffled(rng, rng.sample(tables()["words"], 3))
    return Values(" ".join(sorted(words)), ", ".join(sorted(words)), {"list": ", ".join(words)})


def _sort_numbers(rng: random.Random) -> Values:
    numbers = _shuffled(rng, rng.sample(range(1, 60), 3))
    ordered, shown = (", ".join(map(str, order)) for order in (sorted(numbers), numbers))
    return Values(_of_numbers(numbers), ordered, {"list": shown})


def _shuffled(rng: random.Random, items: list[Any]) -> list[Any]:
    """Return items in another order than that of their sizes."""
    while items == sorted(items):
        rng.shuffle(items)
    return items


def _fact(rng: random.Random) -> Values:
    fact, is_so = rng.choice(tables()["facts"]), rng.random() < 0.5
    ask = fact["ask"].format(x=rng.choice(fact["is" if is_so else "is_not"]))
    return Values(ask, "yes / no" if is_so else "no / yes", {"ask": ask})


def _topic(rng: random.Random) -> Values:
    topic = rng.choice(tables()["topics"])
    return Values(topic, _stem(topic), {"topic": topic})


def _stem(phrase: str) -> str:
    """Return a phrase's last word without the ending of its plural."""
    word = phrase.split()[-1]
    if word.endswith(("ss", "us")):
        return word
    return word.removesuffix("es" if word.endswith("oes") else "s")


def _list(rng: random.Random) -> Values:
    category, members = rng.choice(list(tables()["categories"].items()))
    return Values(category, " / ".join(members), {"category": category})


def _polite(rng: random.Random) -> Values:
    command = rng.choice(tables()["commands"])
    return Values(command, POLITE, {"command": command})


def _phrase(table: str, name: str) -> Draw:
    """Return what draws a phrase of a table, which a response mentions by its last word."""

    def draw(rng: random.Random) -> Values:
        phrase = rng.choice(tables()[table])
        return Values(phrase, _stem(phrase), {name: phrase})

    return draw


def _story(rng: random.Random) -> Values:
    word, second = rng.sample(tables()["words"], 2)
    key = " ".join(sorted([word, second]))
    return Values(key, f"{word}, {second}", {"word": word, "second": second})


def _difference(rng: random.Random) -> Values:
    x, y = rng.choice(tables()["pairs"])
    return Values(x, f"{_stem(x)}, {_stem(y)}", {"x": x, "y": y})


DRAW: dict[str, Draw] = {
    "add": _arithmetic(lambda a, b: a + b, (2, 12), (2, 12)),
    "subtract": _arithmetic(lambda a, b: a - b, (9, 20), (2, 8)),
    "multiply": _arithmetic(lambda a, b: a * b, (2, 9), (2, 9)),
    "double": _arithmetic(lambda a: 2 * a, (2, 25)),
    "share": _arithmetic(lambda a, b: b, (2, 6), (2, 9)),
    "two_steps": _arithmetic(lambda a, b, c: a + b - c, (3, 12), (2, 9), (2, 5)),
    "price": _arithmetic(lambda a, b, c: a * b + c, (2, 5), (2, 6), (2, 9)),
    "sequence": _sequence,
    "larger": _larger,
    "who": _who,
    "count": _count,
    "letters": _of_word(lambda word: str(len(word))),
    "units": _units,
    "day": _calendar("days", 5),
    "month": _calendar("months", 6),
    "opposite": _entry("opposites"),
    "capital": _entry("capitals"),
    "continent": _entry("continents"),
    "language": _entry("languages"),
    "plural": _entry("plurals"),
    "past": _entry("past"),
    "young": _entry("young"),
    "color": _entry("colors"),
    "which": _which,
    "odd": _odd,
    "first_letter": _of_word(lambda word: word[0]),
    "spell": _of_word("-".join),
    "sort_words": _sort_words,
    "sort_numbers": _sort_numbers,
    "fact": _fact,
    "about": _topic,
    "explain": _topic,
    "poem": _topic,
    "question": _topic,
    "title": _topic,
    "list": _list,
    "polite": _polite,
    "steps": _phrase("tasks", "task"),
    "story": _story,
    "difference": _difference,
    "message": _phrase("occasions", "occasion"),
    "advice": _phrase("occasions", "occasion"),
}
