"""An answer taken apart: choice letter, name, value and unit, each in the one spelling.

Words before a number (`The answer is`, `\\text{Area:}`) are dropped unless they change what is said
(`at least`, `not`); so is the domain of a family's letter (`, k \\in \\mathbb{Z}`).
"""

from __future__ import annotations

import re
from typing import NamedTuple

from iwopd_megatron.grading.math import kinds as math_kinds
from iwopd_megatron.grading.math import units as math_units
from iwopd_megatron.grading.math import words as math_words
from iwopd_megatron.grading.math.layout import strip_braces
from iwopd_megatron.grading.math.lists import members
from iwopd_megatron.grading.math.normalise import normalise
from iwopd_megatron.grading.math.regions import RELATION, plain_intervals
from iwopd_megatron.grading.math.values import is_exact, parse

# words before a number that change what is said
SAYS = (
    r"[^{}]*\b(?:[Yy]es|[Nn]o|[Tt]rue|[Ff]alse|[Nn]ot|least|most|more|less|greater|fewer|over|under"
    r"|between|except|but|than|minus|negative|and|or|log|ln|sin|cos|tan|lcm|gcd|max|min|mod)\b"
)
PROSE = re.compile(
    rf"(?:\\text\s*\{{(?!{SAYS})[^{{}}]*(?:[:=]|\b(?:is|are|to|get|have))\s*\}}"
    rf"|\\text\s*\{{(?!{SAYS})[^{{}}()]*[a-z.][^{{}}()]*\}}(?=\s*(?:-?\d|\\frac|\\sqrt|\\pi))"
    r"|(?:[A-Za-z]{2,}\s+)*[A-Za-z]{2,}\s*(?::|\b(?:is|are)\b))\s*[:=]?\s*(?=\S)"
)
# no two alternatives begin alike: a long text is read in one pass
NAME = re.compile(
    r"((?:\\text\s*\{[^{}]*\}|\\overline\{\w+\}|\\(?!text|overline)[a-z]+(?![a-z])|\{\w\}"
    r"|_(?:\{\w+\}|\d+(?!\d)|[a-zA-Z])|[\[\]()|a-zA-Z,+' ])+)(?:=|\\in(?![a-zA-Z]))\s*(.*)",
    re.DOTALL,
)
FAMILY = re.compile(
    r",?\s*(?:\(|\\text\s*\{[^{}]*\}|where|for)?\s*\(?\s*([a-z])\s*\\in\s*\\mathbb\{Z\}\s*\)?$"
)

# `c \in \mathbb{R}`, `for some constant c`: letters that may be any number say nothing more
LETTERS = r"[a-zA-Z](?:\s*(?:,|\\text\s*\{\s*and\s*\})\s*[a-zA-Z])*"
ANY = r"\s*\\in\s*\\mathbb\{[RC]\}"
FREE = re.compile(
    rf"(?:,\s*{LETTERS}{ANY}|,?\s*\\text\s*\{{\s*(?:for|where|with)\b"
    r"(?![^{}]*\b(?:positive|negative|non|integers?|natural|odd|even|primes?|rational|distinct)\b)"
    rf"[^{{}}\d<>=]*\}}\s*{LETTERS}(?:{ANY})?(?:\s*\\text\s*\{{\s*(?:is|are)\b[^{{}}\d<>=]*\bconstants?"
    r"\s*\})?)\s*$"
)


class Reading(NamedTuple):
    """An answer as given, the whole in one spelling, and its parts ("" where it has none)."""

    raw: str
    whole: str
    letter: str
    name: str
    value: str
    unit: str


def read(text: str) -> Reading:
    """Return the parts of LaTeX as it stands in a box or a data file."""
    whole = normalise(text)
    letter, rest = math_words.choice(whole)
    rest = rest or whole
    value = strip_braces(PROSE.sub("", rest, count=1).strip())
    name, value = _name(_family(_without_free(plain_intervals(value))))
    if "\\equiv" in rest or re.search(r"\bmod\b", rest):
        name, value = "", rest
    unit = ""
    if not math_kinds.is_one(value):
        value, unit = math_units.split_unit(value)
    return Reading(text, whole, letter, name, math_words.as_latex(value.strip()), unit)


def _name(text: str) -> tuple[str, str]:
    """Return (what stands before an equals sign or "", what stands behind the last one)."""
    match = NAME.fullmatch(text)
    if not match or RELATION.search(text) or len(members(match[2])) > 1:
        return "", text
    if any(match[1].count(a) != match[1].count(b) for a, b in ("{}", "()")):
        return "", text
    return re.sub(r"\s", "", match[1]), match[2].split("=")[-1].strip()


def _without_free(text: str) -> str:
    """Return the text without a last clause that lets letters be any number."""
    match = FREE.search(text)
    return text[: match.start()] if match and match.start() else text


def _family(text: str) -> str:
    """Return the text without the domain of a letter for all integers; the letter becomes k."""
    match = FAMILY.search(text)
    if not match or not match.start():
        return text
    return re.sub(rf"(?<![a-zA-Z\\]){match[1]}(?![a-zA-Z])", "k", text[: match.start()])


def describe(text: str) -> str:
    """Return in words for people how an answer was read."""
    reading = read(text)
    value = parse(reading.value)
    shown = reading.value or reading.whole or "nothing"
    if math_words.is_word(reading.value):
        shown = math_words.word(reading.value) or shown
    elif len(shown) > 1 and not math_kinds.is_one(reading.value) and is_exact(value):
        shown = str(value)
    choice = f"({reading.letter}) " if reading.letter and reading.letter != reading.value else ""
    name = f"{reading.name} = " if reading.name else ""
    return choice + name + shown + (f" {reading.unit}" if reading.unit not in ("", "?") else "")
