"""Questions asked twice, and questions that a held-out set also has: 13 words in a row in common.

Words are runs of letters and digits in lower case; a question of fewer words counts as a whole. Of
a row of messages all must be the same to be asked twice; all that the user says is a question.
Letters are compared as composed ones (NFC): an accent may be written as a character of its own.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable

from iwopd_megatron.data.problems import Problem

WORDS = 13
_WORD = re.compile(r"[^\W_]+")


def duplicates(problems: list[Problem]) -> list[bool]:
    """Return for each problem whether an earlier one asks the same, blanks aside."""
    seen: set[tuple[tuple[str, str], ...]] = set()
    out = []
    for problem in problems:
        key = tuple((role, " ".join(_composed(text).split())) for role, text in problem.texts)
        out.append(key in seen)
        seen.add(key)
    return out


def contaminated(problems: list[Problem], held_out: Iterable[Problem]) -> list[bool]:
    """Return for each problem whether it shares WORDS words in a row with a held-out one."""
    known = {gram for problem in held_out for gram in _problem_grams(problem)}
    return [not known.isdisjoint(_problem_grams(problem)) for problem in problems]


def _problem_grams(problem: Problem) -> set[tuple[str, ...]]:
    said = [text for role, text in problem.texts if role == "user"]
    return set().union(*map(_grams, said))


def _grams(text: str) -> set[tuple[str, ...]]:
    words = _WORD.findall(_composed(text).lower())
    if not words:
        return {(text,)}  # nothing but symbols
    return {tuple(words[i : i + WORDS]) for i in range(max(1, len(words) - WORDS + 1))}


def _composed(text: str) -> str:
    return unicodedata.normalize("NFC", text)
