"""Is an answer right? One grader per kind of problem: its `grader`, or else its `source`.

To add one, write a function (response, answer) -> bool and give it a name in GRADERS; a function
in CHECKS refuses answers of its problems when their rows are read.
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Callable, Mapping
from functools import cache

from iwopd_megatron import toy_task
from iwopd_megatron.errors import RecipeError
from iwopd_megatron.grading.code import cases as code_tests
from iwopd_megatron.grading.code import grader as code_grader
from iwopd_megatron.grading.math import grader as math_grader
from iwopd_megatron.grading.pool import Answer, Grade, Pool

GRADERS: dict[str, Callable[[str, str], bool]] = {
    "math": math_grader.is_right,
    "code": code_grader.is_right,
    toy_task.SOURCE: toy_task.is_right,
}
CHECKS: dict[str, Callable[[str], None]] = {
    "code": code_tests.check_tests,
    "math": math_grader.check_reference,
}
IN_PROCESS = {toy_task.SOURCE}  # neither hangs nor crashes; all others run in the pool
PREPARE = {"math": math_grader.prepare}  # what a new process does before its first answer
MATH_SECONDS = 2.0  # of processor time for one comparison
SECONDS = 600.0  # around the runs of a program, which have limits of their own


def check_graders(names: Mapping[str, str]) -> None:
    """RecipeError for a kind of problem that nothing here grades; names: with a place of each."""
    for name in sorted(names.keys() - GRADERS.keys()):
        raise RecipeError(
            f"{names[name]}: no grader '{name}'; known graders: {', '.join(GRADERS)}; name one in "
            "the source's 'grader' (default: the problem's source)."
        )


def check_answer(grader: str, answer: str, where: str) -> None:
    """RecipeError that names the row `where`, if its answer is nothing that the grader can use."""
    check = CHECKS.get(grader)
    if check is None:
        return
    try:
        check(answer)
    except RecipeError as error:
        raise RecipeError(f"{where}: {error}") from None


@cache
def prepare(grader: str) -> None:
    """Import what a grader needs, once a process."""
    PREPARE.get(grader, lambda: None)()


def grade(answers: list[Answer]) -> list[Grade]:
    """1.0 where the response solves the problem, else 0.0, and what was in the way; in order."""
    check_graders({answer.grader: "an answer" for answer in answers})
    grades = [Grade(0.0)] * len(answers)
    for kind in sorted({answer.grader for answer in answers}):
        places = [place for place, answer in enumerate(answers) if answer.grader == kind]
        found = _grade_kind(kind, [answers[i] for i in places])
        for place, one in zip(places, found, strict=True):
            grades[place] = one
    return grades


def _grade_kind(kind: str, answers: list[Answer]) -> list[Grade]:
    if kind in IN_PROCESS:
        return [Grade(float(GRADERS[kind](x.response, x.answer))) for x in answers]
    return _pool(MATH_SECONDS if kind == "math" else SECONDS).grade(answers)


@cache
def _pool(seconds: float) -> Pool:
    """One pool a process and time limit; ranks of one machine share its cores."""
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    pool = Pool(max(1, len(os.sched_getaffinity(0)) // ranks), seconds)
    atexit.register(pool.close)
    return pool
