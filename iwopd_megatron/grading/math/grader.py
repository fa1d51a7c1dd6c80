"""Math answers: the last box of a response against the reference answer.

`boxes` finds the box, `normalise` gives an answer one spelling, `readings` takes it apart,
`compare` compares (by `units`, `words`, `kinds`, `regions`), math-verify judges expressions
(`values`), and `guards` refuses what it takes for equal too easily.

No time limit here (math-verify's uses signals, which a C loop ignores): grading runs in a process
that is killed.
"""

from __future__ import annotations

import re

from iwopd_megatron.errors import RecipeError
from iwopd_megatron.grading.math import compare as math_compare
from iwopd_megatron.grading.math.boxes import last_boxed, last_boxes
from iwopd_megatron.grading.math.normalise import normalise
from iwopd_megatron.grading.math.readings import describe, read

SUFFIX = "\nPlease reason step by step, and put your final answer within \\boxed{}."


def prepare() -> None:
    """Import math-verify and let it build its parser, which takes longer than most answers."""
    is_equal(r"\frac{1}{2}", "x^2")


def is_right(response: str, answer: str) -> bool:
    """Return whether the last box of a response holds the answer; without a box it is wrong."""
    content = last_boxed(response)
    if content is None:
        return False
    reference = last_boxed(answer) or answer
    if is_equal(content, reference):
        return True
    boxes = last_boxes(response)  # side by side at the end: the members of a list
    return len(boxes) > 1 and is_equal(", ".join(boxes), reference)


def check_reference(answer: str) -> None:
    """Refuse a reference answer that no answer equals; RecipeError says why."""
    boxed = last_boxed(answer)
    reference = answer if boxed is None else boxed
    braces = re.sub(r"\\.", "", reference)
    depth = 0
    for brace in re.findall(r"[{}]", braces):
        depth += 1 if brace == "{" else -1
        if depth < 0:
            break
    if depth:
        raise RecipeError(f"answer {answer!r:.80} has a brace without its other one; mend it.")
    if not normalise(reference):
        raise RecipeError(f"answer {answer!r:.80} says nothing; no response could be right.")


def explain(response: str, answer: str) -> str:
    """Return in a phrase how both sides were read and whether they agree.

    For responses that have a box.
    """
    reference = last_boxed(answer) or answer
    right = is_right(response, answer)
    one = last_boxed(response)
    if one is None:
        return "no box of the answer is complete; look at its braces"
    if right and not is_equal(one, reference):
        one = ", ".join(last_boxes(response))
    mine, theirs = (describe(text) for text in (one, reference))
    if right:
        return f"both are {mine}" if mine == theirs else f"{mine} is {theirs}"
    if mine == theirs:  # the texts differ where their readings as mathematics do not
        mine, theirs = one.strip(), reference.strip()
    return f"{mine} is not {theirs}"


def is_equal(content: str, answer: str) -> bool:
    """Return whether two LaTeX answers mean the same."""
    return math_compare.equal(read(content), read(answer))
