"""Answers that are no expressions: numbers in a base, congruences, times of day.

Numerals in a base are compared digit by digit, and the base only where both name one (the question
often does). Congruences agree if their moduli and their residues do. Times agree in hours and
minutes, and in the half of the day where the reference names it.
"""

from __future__ import annotations

import re
from typing import NamedTuple

_NAMES = "two three four five six seven eight nine ten eleven twelve".split()
BASES = {name: base for base, name in enumerate(_NAMES, 2)} | {"sixteen": 16}
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


class Congruence(NamedTuple):
    """`subject = residues (mod modulus)`; the subject is "" where there is none."""

    subject: str
    residues: frozenset[int | str]
    modulus: str


def compare(answer: str, reference: str) -> bool | None:
    """Return whether two normalised answers of one kind agree; None if neither is of any."""
    for kind in (_times, _congruences, _numerals):
        verdict = kind(answer, reference)
        if verdict is not None:
            return verdict
    return None


def is_one(text: str) -> bool:
    """Return whether a normalised answer is of one of these kinds."""
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
    if mine is not None and theirs is not None:
        named = mine.subject and theirs.subject
        is_same = (mine.residues, mine.modulus) == (theirs.residues, theirs.modulus)
        return is_same and (not named or mine.subject == theirs.subject)
    if mine is not None:
        return _is_its_residue(mine, reference)
    return None if theirs is None else _is_its_residue(theirs, answer)


def _is_its_residue(congruence: Congruence, number: str) -> bool:
    """Return whether a number alone is the residue of a congruence without a subject."""
    is_lone = congruence.subject == "" and re.fullmatch(r"-?\d+", number) is not None
    return is_lone and _residues(number, congruence.modulus) == congruence.residues


def _congruence(text: str) -> Congruence | None:
    match = MODULUS.fullmatch(text)
    if match is None:
        return None
    left, equivalent, right = match[1].rpartition(r"\equiv")
    if not equivalent:
        left, _, right = match[1].rpartition("=")
    return Congruence(left.replace(" ", ""), _residues(right, match[2]), match[2])


def _residues(text: str, modulus: str) -> frozenset[int | str]:
    """Return the members of a list, reduced by the modulus where they are numbers."""
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
    is_same = all(int(mine[i] or 0) == int(theirs[i] or 0) for i in (1, 2, 3))
    half = not mine[4] or not theirs[4] or mine[4].lower() == theirs[4].lower()
    return is_same and half
