"""The graders by name. A problem's grader is its `grader`, or else its `source`.

To add one, write a function (response, answer) -> bool and give it a name in GRADERS; a function
in CHECKS refuses answers of its problems when their rows are read.
"""

from __future__ import annotations

import atexit
from collections.abc import Callable, Mapping
from functools import cache

from iwopd_megatron import text_task, toy_task
from iwopd_megatron.errors import RecipeError
from iwopd_megatron.grading.code import grader as code_grader
from iwopd_megatron.grading.code.cases import check_test_cases
from iwopd_megatron.grading.math import grader as math_grader
from iwopd_megatron.grading.pool import Grade, GradingPool, Submission
from iwopd_megatron.runtime.host import own_cores

GRADERS: dict[str, Callable[[str, str], bool]] = {
    "math": math_grader.is_right,
    "code": code_grader.is_right,
    toy_task.SOURCE: toy_task.is_right,
    text_task.SHORT: text_task.is_right,
    text_task.OPEN: text_task.is_on_topic,
}
CHECKS: dict[str, Callable[[str], None]] = {
    "code": check_test_cases,
    "math": math_grader.check_reference,
    text_task.SHORT: text_task.check_reference,
    text_task.OPEN: text_task.check_reference,
}
# they neither hang nor crash; all others run in the pool
IN_PROCESS = {toy_task.SOURCE, text_task.SHORT, text_task.OPEN}
PREPARE = {"math": math_grader.prepare}  # what a new process does before its first answer
MATH_SECONDS = 2.0  # of processor time for one comparison
SECONDS = 600.0  # around the runs of a program, which have limits of their own


def check_graders(names: Mapping[str, str]) -> None:
    """Refuse the first name that no grader has; RecipeError.

    names: graders, each with a place (file and line) that the error names.
    """
    for name in sorted(names.keys() - GRADERS.keys()):
        raise RecipeError(
            f"{names[name]}: no grader '{name}'; known graders: {', '.join(GRADERS)}; name one in "
            "the source's 'grader' (default: the problem's source)."
        )


def check_answer(grader: str, answer: str, where: str) -> None:
    """Refuse a reference answer that the grader cannot use; RecipeError names the row `where`."""
    check = CHECKS.get(grader)
    if check is None:
        return
    try:
        check(answer)
    except RecipeError as error:
        raise RecipeError(f"{where}: {error}") from None


@cache
def prepare(grader: str) -> None:
    """Import what a grader needs, once in a process."""
    PREPARE.get(grader, lambda: None)()


def grade(submissions: list[Submission]) -> list[Grade]:
    """Grade submissions, in order: 1.0 where the response solves the problem, else 0.0.

    RecipeError for the name of a grader that there is not.
    """
    check_graders({submission.grader: "an answer" for submission in submissions})
    grades = [Grade(0.0)] * len(submissions)
    for kind in sorted({submission.grader for submission in submissions}):
        places = [i for i, submission in enumerate(submissions) if submission.grader == kind]
        found = _grade_kind(kind, [submissions[i] for i in places])
        for place, one in zip(places, found, strict=True):
            grades[place] = one
    return grades


def _grade_kind(kind: str, submissions: list[Submission]) -> list[Grade]:
    if kind in IN_PROCESS:
        return [Grade(float(GRADERS[kind](x.response, x.answer))) for x in submissions]
    return _pool(MATH_SECONDS if kind == "math" else SECONDS).grade(submissions)


@cache
def _pool(seconds: float) -> GradingPool:
    """Return this process's pool of a time limit."""
    pool = GradingPool(own_cores(), seconds)
    atexit.register(pool.close)
    return pool
