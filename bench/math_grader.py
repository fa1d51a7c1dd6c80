"""The math grader before and after: plain math-verify, and with its normaliser and guards.

`python bench/math_grader.py`: false positives and negatives on every table of tests/math_pairs, and
on integers 0 to 999 in the spellings of contest answers, against themselves and against others.
"""

from __future__ import annotations

import logging
import signal
import sys
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from iwopd_megatron.grading.math.grader import is_right

LIMIT = 10.0  # processor seconds a pair
FOLDER = Path(__file__).parent.parent / "tests" / "math_pairs"
BOXES = ("\\boxed", "\\fbox", "\\framebox")
SPELLINGS = [
    "{n}",
    "{n:03d}",
    "${n}$",
    "\\text{{{n}}}",
    "x = {n}",
    "{n}.0",
    "\\mathbf{{{n}}}",
    "{n}.",
    "m+n={n}",
    "{n}\\text{{ cm}}",
    "{n}^\\circ",
    "\\, {n} \\,",
]


class Pair(NamedTuple):
    kind: str
    label: str
    answer: str
    reference: str


def main() -> None:
    tables = {file.stem: read_pairs(file) for file in sorted(FOLDER.glob("*.tsv"))}
    tables["integers 0 to 999"] = integer_pairs()
    print(f"{'table':20} {'grader':12} {'false positives':>20} {'false negatives':>20} {'s':>7}")
    for name, pairs in tables.items():
        for grader, grade in (("math-verify", plain), ("ours", is_right)):
            start = time.process_time()
            found = [within(LIMIT, grade, pair) for pair in pairs]
            seconds = time.process_time() - start
            shares = [_share(pairs, found, label) for label in ("wrong", "right")]
            print(f"{name:20} {grader:12} {shares[0]:>20} {shares[1]:>20} {seconds:7.1f}")


class Cut(BaseException):
    """No Exception: math-verify swallows those."""


def within(seconds: float, grade: Callable[[str, str], bool], pair: Pair) -> bool:
    """A pair's grade; False if it takes longer, as in a run."""
    signal.signal(signal.SIGPROF, _cut)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        return grade(response(pair), pair.reference)
    except Cut:
        return False
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def _cut(*_: object) -> None:
    raise Cut


def read_pairs(file: Path) -> list[Pair]:
    """A table's pairs, its heading left out."""
    lines = file.read_text(encoding="utf-8").splitlines()[1:]
    return [Pair(*line.split("\t")) for line in lines]


def response(pair: Pair) -> str:
    """A response that ends with this answer in a box, unless the answer has boxes of its own."""
    if pair.kind == "boxes" or any(box in pair.answer for box in BOXES):
        return pair.answer
    return f"Hence $\\boxed{{{pair.answer}}}$."


def integer_pairs() -> list[Pair]:
    """Every integer in four spellings; beside a neighbour, 10 more and its mirror."""
    pairs = []
    for n in range(1000):
        for shift in range(4):
            text = SPELLINGS[(n + 3 * shift) % len(SPELLINGS)].format(n=n)
            pairs.append(Pair("integer", "right", text, str(n)))
        for i, other in enumerate((n + 1, n + 10, int(str(n)[::-1]))):
            if other != n:
                text = SPELLINGS[(n + i) % len(SPELLINGS)].format(n=n)
                pairs.append(Pair("integer", "wrong", text, str(other)))
    return pairs


def plain(response: str, answer: str) -> bool:
    """math-verify on the last \\boxed{} of a response, with its own defaults."""
    from math_verify import parse, verify

    logging.getLogger("math_verify").setLevel(logging.CRITICAL)
    start = response.rfind("\\boxed{")
    if start == -1:
        return False
    gold, found = (
        parse(text, extraction_config=_targets(), parsing_timeout=None)
        for text in (f"\\boxed{{{answer.strip().strip('$')}}}", response[start:].rstrip("$."))
    )
    return bool(gold) and verify(gold, found, timeout_seconds=None)


@cache
def _targets() -> list[Any]:
    from math_verify import ExprExtractionConfig, LatexExtractionConfig

    return [LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig()]


def _share(pairs: list[Pair], found: list[bool], label: str) -> str:
    """How many pairs with this label were graded otherwise."""
    graded = [right for pair, right in zip(pairs, found, strict=True) if pair.label == label]
    wrong = sum(right != (label == "right") for right in graded)
    return f"{wrong} of {len(graded)} ({wrong / max(len(graded), 1):.1%})"


if __name__ == "__main__":
    sys.exit(main())
