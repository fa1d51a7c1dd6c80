"""Math answers by math-verify: the last \\boxed{} of a response against the reference answer.

Equivalence is symbolic: sets, intervals, units, percentages, radicals, mixed LaTeX. No time limit
here (math-verify's uses signals, which a C loop ignores): grading runs in a process that is killed.
"""

from __future__ import annotations

import logging
from functools import cache
from typing import Any

SUFFIX = "\nPlease reason step by step, and put your final answer within \\boxed{}."
BOX = "\\boxed{"


def is_right(response: str, answer: str) -> bool:
    """Whether the last box holds the answer; a response without a box is wrong."""
    content = last_boxed(response)
    return content is not None and is_equal(content, last_boxed(answer) or answer)


def last_boxed(text: str) -> str | None:
    """What stands in the last complete \\boxed{...}, nested braces and all; None without one."""
    start = text.rfind(BOX)
    while start != -1:
        depth, place = 1, start + len(BOX)
        while place < len(text):
            if text[place] == "\\":
                place += 1  # \{ and \} are no grouping
            else:
                depth += (text[place] == "{") - (text[place] == "}")
            if depth == 0:
                return text[start + len(BOX) : place]
            place += 1
        start = text.rfind(BOX, 0, start)
    return None


def is_equal(content: str, answer: str) -> bool:
    """Whether two LaTeX answers mean the same."""
    from math_verify import verify

    gold = _parse(answer)
    return bool(gold) and verify(gold, _parse(content), timeout_seconds=None)


def _parse(latex: str) -> list[Any]:
    from math_verify import parse

    # sympy cannot read some answers, which then compare as text: no news to anyone
    logging.getLogger("math_verify").setLevel(logging.CRITICAL)
    latex = latex.strip().strip("$")
    return parse(BOX + latex + "}", extraction_config=_targets(), parsing_timeout=None)


@cache
def _targets() -> list[Any]:
    from math_verify import ExprExtractionConfig, LatexExtractionConfig

    return [LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig()]
