"""Programs in answers, run in a sandbox against the tests of their problem.

Test cases of every shape are cases.py's, and program_text.py finds the program in a response. The
program never shares a process with expected results, asserts excepted. Programs of `inputs` and
`outputs` find the names and the recursion limit that LiveCodeBench and PRIME put in front of them;
those of EvalPlus and of asserts find nothing but Python, as in EvalPlus. A program on standard
input is `__main__`, and an exit code other than 0 is a failure whatever it printed.
"""

from __future__ import annotations

import math
from typing import Any

from iwopd_megatron.grading.code.cases import (
    AssertCases,
    CallCases,
    EvalPlusCases,
    StdinCases,
    TestCases,
    read_test_cases,
)
from iwopd_megatron.grading.code.evalplus_grader import check_evalplus
from iwopd_megatron.grading.code.evalplus_text import longest_program
from iwopd_megatron.grading.code.program_text import defines, last_program, reads_input
from iwopd_megatron.grading.code.sandbox import ProgramError, Sandbox, sandbox
from iwopd_megatron.grading.code.sandbox_values import long_numbers
from iwopd_megatron.grading.code.shown import shown

SECONDS = 10.0  # processor seconds of one input, or of all assertions
SECONDS_IN_ALL = 60.0  # of all calls of a function


def is_right(response: str, answer: str) -> bool:
    """Return whether the program in the response passes all test cases of the answer."""
    return explain(response, answer)[0]


@long_numbers()
def explain(response: str, answer: str) -> tuple[bool, str]:
    """Return whether the program in the response passes all test cases, and why, in a sentence.

    RecipeError if the answer holds no test cases, SandboxError if the sandbox fails.
    """
    cases = read_test_cases(answer)
    program = find_program(response, cases)
    if program is None:
        return False, "no program found: no block of Python, and the whole is not Python either."
    with sandbox(preamble=isinstance(cases, (StdinCases, CallCases))) as box:
        try:
            count = _check(box, program, cases)
        except ProgramError as error:
            return False, f"the program fails: {error}."
    return True, f"the program passes {count} tests." if count > 1 else "the program passes 1 test."


def find_program(response: str, cases: TestCases) -> str | None:
    """Return the program in a response that these cases are for; None if it holds none."""
    if isinstance(cases, EvalPlusCases):
        return longest_program(response, cases.function)
    if isinstance(cases, StdinCases):
        return last_program(response, reads_input)
    called = cases.functions if isinstance(cases, AssertCases) else frozenset([cases.function])
    return last_program(response, lambda code: defines(code, called))


def _check(box: Sandbox, program: str, cases: TestCases) -> int:
    """Return the number of test cases; ProgramError unless the program passes them all."""
    if isinstance(cases, EvalPlusCases):
        return check_evalplus(box, program, cases)
    if isinstance(cases, AssertCases):
        return _check_asserts(box, program, cases)
    if isinstance(cases, CallCases):
        return _check_calls(box, program, cases)
    for place, (given, expected) in enumerate(zip(cases.inputs, cases.outputs, strict=True), 1):
        outcome = box.read_stdin(program, given, SECONDS)
        where = f"test {place} of {len(cases.inputs)}, input {shown(given)}"
        if outcome.status != "ok":
            raise ProgramError(f"{where}: {outcome.reason}")
        if not same_output(outcome.output, expected):
            raise ProgramError(f"{where}: expected {shown(expected)}, got {shown(outcome.output)}")
    return len(cases.inputs)


def same_output(output: str, expected: str) -> bool:
    """Return whether two outputs have the same words; numbers with a point agree to 1e-6."""
    words, wanted = output.split(), expected.split()
    return len(words) == len(wanted) and all(map(_same_word, words, wanted))


def _same_word(word: str, wanted: str) -> bool:
    if word == wanted:
        return True
    try:
        return "." in wanted and math.isclose(
            float(word), float(wanted), rel_tol=1e-6, abs_tol=1e-6
        )
    except ValueError:
        return False


def _check_asserts(box: Sandbox, program: str, cases: AssertCases) -> int:
    try:
        box.check_asserts(program, cases.asserts, SECONDS)
    except ProgramError as error:
        failing = "".join(f"{shown(x)}: " for x in cases.asserts[error.passed :][:1])
        where = f"assert {error.passed + 1} of {len(cases.asserts)}"
        raise ProgramError(f"{where}, {failing}{error}") from None
    return len(cases.asserts)


def _check_calls(box: Sandbox, program: str, cases: CallCases) -> int:
    limits, passed = [SECONDS] * len(cases.inputs), 0
    try:
        results = box.call(
            program, cases.function, cases.inputs, limits, SECONDS_IN_ALL, methods=True
        )
        for passed, (value, expected) in enumerate(zip(results, cases.outputs, strict=True)):
            got = _as_json(value[0])
            if got != expected and [got] != expected:
                raise ProgramError(f"expected {shown(expected)}, got {shown(got)}", passed)
    except ProgramError as error:
        given = "".join(f", input {shown(x)}" for x in cases.inputs[error.passed :][:1])
        where = f"test {error.passed + 1} of {len(cases.inputs)}{given}"
        raise ProgramError(f"{where}: {error}") from None
    return len(cases.inputs)


def _as_json(value: Any) -> Any:
    """Return a value with tuples as lists and keys as texts, which is all that JSON can hold."""
    if isinstance(value, (list, tuple)):
        return [_as_json(item) for item in value]
    if isinstance(value, dict):
        return {str(key): _as_json(item) for key, item in value.items()}
    return value
