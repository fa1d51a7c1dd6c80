"""Answers that are no expressions: numbers in a base, congruences, times of day.

Numerals in a base are compared digit by digit, and the base only where both name one (the question
often does). Congruences agree if their moduli and their residues do. Times agree in hours and
minutes, and in the half of the day where the reference names it.
"""

from __future__ import annotations

import re
from collections.abc import Callable

BASES = dict(zip(
    "two three four five six seven eight nine ten eleven twelve".split(), range(2, 13), strict=True
)) | {"sixteen": 16}  # fmt: skip
TEXT = r"(?:\\text\s*\{\s*)?"
NUMERAL = re.compile(
    rf"\(?\s*{TEXT}([\dA-F]*\d[\dA-F]*|[A-F]{{2,}})\s*\}}?\s*\)?\s*(?:_\s*\{{?\s*{TEXT}\(?(?:base\s*\}}?\s*)?(\d+|[a-z]+)\)?\s*\}}?\s*\}}?"
    rf"|{TEXT}\s*(?:\(|in )?\s*base\s*\}}?\s*(\d+|[a-z]+)\)?\s*\}}?)",
)
MODULUS = re.compile(
    r"(.*?)\s*(?:\\pmod\s*\{?|\\bmod\s*\{?|\\mod\s*\{?|\(?\s*(?:\\text\s*\{\s*\(?)?\s*mod(?:ulo)?\s*\}?\s*)"
    r"\s*([\w^]+)\s*\}?\s*\)?\s*\}?"
)
TIME = re.compile(
    r"(\d{1,2}):(\d\d)(?::(\d\d))?\s*(?:\\text\s*\{)?\s*(?:([aApP])\.?\s*[mM]\.?)?\s*\}?"
)


def compare(answer: str, reference: str) -> bool | None:
    """Whether two normalised answers of one of these kinds agree; None if neither is of any."""
    for kind in (_times, _congruences, _numerals):
        verdict = kind(answer, reference)
        if verdict is not None:
            return verdict
    return None


def is_one(text: str) -> bool:
    """Whether a normalised answer is of one of these kinds."""
    return any(pattern.fullmatch(text) for pattern in (TIME, MODULUS, NUMERAL))


def _numerals(answer: str, reference: str) -> bool | None:
    mine, theirs = NUMERAL.fullmatch(answer), NUMERAL.fullmatch(reference)
    if not (mine or theirs):
        return None
    return _digits(answer, mine) == _digits(reference, theirs) and (
        not (mine and theirs) or _base(mine) == _base(theirs)
    )


def _digits(text: str, numeral: re.Match[str] | None) -> str:
    return numeral[1] if numeral else re.sub(r"[\s{}()]|\\text", "", text)


def _base(numeral: re.Match[str]) -> int | str:
    name = numeral[2] or numeral[3]
    return int(name) if name.isdigit() else BASES.get(name, name)


def _congruences(answer: str, reference: str) -> bool | None:
    mine, theirs = _congruence(answer), _congruence(reference)
    if mine is None and theirs is None:
        return None
    if mine is None or theirs is None:
        has, other = (mine, reference) if mine else (theirs, answer)
        # a residue alone, where the congruence says of nothing that it is one
        return has[0] == "" and re.fullmatch(r"-?\d+", other) is not None and (
            _residues(other, has[2]) == has[1]
        )  # fmt: skip
    named = mine[0] and theirs[0]
    return mine[1:] == theirs[1:] and (not named or mine[0] == theirs[0])


def _congruence(text: str) -> tuple[str, frozenset[int | str], str] | None:
    """(what is congruent, residues, modulus)."""
    match = MODULUS.fullmatch(text)
    if match is None:
        return None
    left, equivalent, right = match[1].rpartition(r"\equiv")
    if not equivalent:
        left, _, right = match[1].rpartition("=")
    return left.replace(" ", ""), _residues(right, match[2]), match[2]


def _residues(text: str, modulus: str) -> frozenset[int | str]:
    """Members of a list, reduced where they are numbers."""
    text = re.sub(r"\\text\s*\{\s*(?:or|and)\s*\}|\bor\b|\\[{}]", ",", text)
    found: set[int | str] = set()
    for part in filter(None, (piece.replace(" ", "") for piece in text.split(","))):
        for member in (
            (part.replace(r"\pm", ""), part.replace(r"\pm", "-")) if "\\pm" in part else (part,)
        ):
            is_number = re.fullmatch(r"[+-]?\d+", member) and modulus.isdigit() and int(modulus) > 0
            found.add(int(member) % int(modulus) if is_number else member)
    return frozenset(found)


def _times(answer: str, reference: str) -> bool | None:
    mine, theirs = TIME.fullmatch(answer), TIME.fullmatch(reference)
    if not (mine and theirs):
        return None
    same: Callable[[int], bool] = lambda i: int(mine[i] or 0) == int(theirs[i] or 0)  # noqa: E731
    half = not mine[4] or not theirs[4] or mine[4].lower() == theirs[4].lower()
    return same(1) and same(2) and same(3) and half
