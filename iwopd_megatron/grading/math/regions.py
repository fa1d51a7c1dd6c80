"""Inequalities, intervals and set-builder notation: `x \\le 3` is `(-\\infty, 3]`.

Two conditions on letters agree only on the same letter; a condition and an interval agree whatever
the letter is.
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple

from iwopd_megatron.grading.math.values import parse

RELATION = re.compile(r"(\\le(?![a-zA-Z])|\\ge(?![a-zA-Z])|\\ne(?![a-zA-Z])|<|>)")
BUILDER = re.compile(
    r"\\\{\s*([a-z])\s*(?:\\in\s*(?:\\mathbb\{R\}|\(-\\infty,\s*\\infty\)))?"
    r"\s*(?:\\mid(?![a-zA-Z])|[:|])(.*)\\\}"
)
MEMBER = re.compile(r"([a-z])\s*\\in(?![a-zA-Z])\s*(.*)")
FRENCH = re.compile(r"([\[\]])([^\[\](),;]*)([,;])([^\[\](),;]*)([\[\]])")


_REALS = r"\\mathbb\{R\}\s*"
# parts of the real line by their symbols, as patterns, and as intervals for `re.sub`
HALVES = {
    re.compile(_REALS + r"(?:\^\s*\{?\s*\+\s*\}?|_\s*\{?\s*(?:>\s*0|\+)\s*\}?)"): r"(0,\\infty)",
    re.compile(_REALS + r"(?:\^\s*\{?\s*-\s*\}?|_\s*\{?\s*<\s*0\s*\}?)"): r"(-\\infty,0)",
    re.compile(_REALS + r"_\s*\{?\s*\\ge\s*0\s*\}?"): r"[0,\\infty)",
    re.compile(_REALS + r"\^\s*\{?\s*(?:\*|\\ast|\\times)\s*\}?"): r"\\mathbb{R}\\setminus\\{0\\}",
}


class Region(NamedTuple):
    """A set of real numbers and the letter it is a condition on, "" for a plain set."""

    numbers: Any
    letter: str


def plain_intervals(text: str) -> str:
    """Rewrite reversed brackets as round ones, and semicolons in brackets as commas."""
    if re.search(r"^\s*\]|\[\s*$|\\cup\s*\]|\[\s*\\cup", text):
        text = FRENCH.sub(
            lambda m: (
                ("(" if m[1] == "]" else "[") + m[2] + "," + m[4] + (")" if m[5] == "[" else "]")
            ),
            text,
        )
    if ";" in text and re.fullmatch(r"\s*[(\[].*[)\]]\s*|\s*\\\{.*\\\}\s*", text):
        # a comma beside semicolons is a decimal comma
        text = re.sub(r"(?<=\d),(?=\d)", ".", text).replace(";", ",")
    for pattern, interval in HALVES.items():
        text = pattern.sub(interval, text)
    return text.replace(r"+\infty", r"\infty")


def same_region(answer: str, reference: str) -> bool:
    """Return whether both describe the same set of reals."""
    mine, theirs = region(answer), region(reference)
    if (
        mine is None
        or theirs is None
        or (mine.letter and theirs.letter and mine.letter != theirs.letter)
    ):
        return False
    if mine.numbers == theirs.numbers:
        return True
    return bool(mine.numbers.symmetric_difference(theirs.numbers).is_empty)


def region(text: str) -> Region | None:
    """Return the set that a condition, an interval or a union describes; None for other texts."""
    import sympy

    letter = ""
    if builder := BUILDER.fullmatch(text.strip()):
        letter, text = builder[1], builder[2]
        found = _condition(text)
        return Region(found.numbers, "") if found and found.letter in ("", letter) else None
    if RELATION.search(text):
        return _condition(text)
    if member := MEMBER.fullmatch(text):
        letter, text = member[1], member[2]
    value = parse(text)
    if not isinstance(value, sympy.Set) or isinstance(value, sympy.FiniteSet) or value.free_symbols:
        return None
    return Region(value.doit(), letter)


def _condition(text: str) -> Region | None:
    """Return the set of alternatives joined by `or`, all in one letter; None for other texts.

    Commas within an alternative narrow it, unless nothing were left: then they widen it.
    """
    import sympy

    found, letters = sympy.S.EmptySet, set()
    for alternative in re.split(r"\s+or\s+|\\cup(?![a-zA-Z])", text):
        chains = [_chain(part) for part in alternative.split(",")]
        parts = [chain for chain in chains if chain is not None]
        if len(parts) < len(chains):
            return None
        letters |= {part.letter for part in parts}
        both = sympy.Intersection(*(part.numbers for part in parts))
        found += both if not both.is_empty else sympy.Union(*(part.numbers for part in parts))
    return Region(found, letters.pop()) if len(letters) == 1 else None


def _chain(text: str) -> Region | None:
    """Solve one relation or a chain like `1 < x \\le 2` in one letter; None for other texts."""
    import sympy

    pieces = RELATION.split(text)
    if len(pieces) < 3:
        return None
    sides = [parse(piece.strip()) for piece in pieces[::2]]
    if not all(isinstance(side, sympy.Expr) for side in sides):
        return None
    letters = set().union(*(side.free_symbols for side in sides))
    if len(letters) != 1:
        return None
    (letter,) = letters
    make = {r"\le": sympy.Le, r"\ge": sympy.Ge, r"\ne": sympy.Ne, "<": sympy.Lt, ">": sympy.Gt}
    numbers = sympy.S.Reals
    for left, sign, right in zip(sides[:-1], pieces[1::2], sides[1:], strict=True):
        numbers = numbers.intersect(_solved(make[sign](left, right), letter))
    return Region(numbers, str(letter))


def _solved(relation: Any, letter: Any) -> Any:
    import sympy

    if relation in (True, False):
        return sympy.S.Reals if relation == True else sympy.S.EmptySet  # noqa: E712
    if isinstance(relation, sympy.Ne):
        return sympy.S.Reals - sympy.solveset(relation.lhs - relation.rhs, letter, sympy.S.Reals)
    return sympy.solve_univariate_inequality(relation, letter, relational=False)
