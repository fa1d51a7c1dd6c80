"""Questions asked twice, and questions that a held-out set also has: 13 words in a row in common.

Words are runs of letters and digits in lower case; a question of fewer words counts as a whole.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from iwopd_megatron.data import Problem

WORDS = 13
_WORD = re.compile(r"[^\W_]+")


def duplicates(problems: list[Problem]) -> list[bool]:
    """Whether an earlier problem asks the same, blanks aside."""
    seen: set[str] = set()
    out = []
    for problem in problems:
        text = " ".join(problem.question.split())
        out.append(text in seen)
        seen.add(text)
    return out


def contaminated(problems: list[Problem], held_out: Iterable[Problem]) -> list[bool]:
    """Whether a problem shares an n-gram with a held-out one."""
    known = {gram for problem in held_out for gram in _grams(problem.question)}
    return [not known.isdisjoint(_grams(problem.question)) for problem in problems]


def _grams(text: str) -> set[tuple[str, ...]]:
    words = _WORD.findall(text.lower())
    if not words:
        return {(text,)}  # nothing but symbols
    return {tuple(words[i : i + WORDS]) for i in range(max(1, len(words) - WORDS + 1))}
