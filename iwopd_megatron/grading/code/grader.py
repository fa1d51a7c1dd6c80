"""Programs in answers, run in a sandbox against the tests of their problem.

Tests of every shape are cases.py's, and program_text.py finds the program in a response. The
program never shares a process with expected results, asserts excepted. Programs of `inputs` and
`outputs` find the names and the recursion limit that LiveCodeBench and PRIME put in front of them;
those of EvalPlus and of asserts find nothing but Python, as in EvalPlus. A program on standard
input is `__main__`, and an exit code other than 0 is a failure whatever it printed.
"""

from __future__ import annotations

import math
from typing import Any

from iwopd_megatron.grading.code.cases import Asserts, Calls, EvalPlus, Prints, Tests, read_tests
from iwopd_megatron.grading.code.evalplus_grader import check_evalplus
from iwopd_megatron.grading.code.evalplus_text import longest_program
from iwopd_megatron.grading.code.program_text import defines, last_program, reads_input
from iwopd_megatron.grading.code.sandbox import ProgramError, Sandbox, sandbox
from iwopd_megatron.grading.code.sandbox_values import long_numbers
from iwopd_megatron.grading.code.shown import shown

SECONDS = 10.0  # processor seconds of one input, or of all assertions
SECONDS_IN_ALL = 60.0  # of all calls of a function


def is_right(response: str, answer: str) -> bool:
    """Whether the program in the response passes all tests of the answer."""
    return explain(response, answer)[0]


@long_numbers()
def explain(response: str, answer: str) -> tuple[bool, str]:
    """Whether the program in the response passes all tests of the answer, and why, in a sentence.

    RecipeError if the answer holds no tests, SandboxError if the sandbox fails.
    """
    tests = read_tests(answer)
    program = find_program(response, tests)
    if program is None:
        return False, "no program found: no block of Python, and the whole is not Python either."
    with sandbox(preamble=isinstance(tests, (Prints, Calls))) as box:
        try:
            count = _check(box, program, tests)
        except ProgramError as error:
            return False, f"the program fails: {error}."
    return True, f"the program passes {count} tests." if count > 1 else "the program passes 1 test."


def find_program(response: str, tests: Tests) -> str | None:
    """The text in a response that these tests are for; None if it holds no program."""
    if isinstance(tests, EvalPlus):
        return longest_program(response, tests.function)
    if isinstance(tests, Prints):
        return last_program(response, reads_input)
    called = tests.functions if isinstance(tests, Asserts) else frozenset([tests.function])
    return last_program(response, lambda code: defines(code, called))


def _check(box: Sandbox, program: str, tests: Tests) -> int:
    """The number of tests; ProgramError unless the program passes them all."""
    if isinstance(tests, EvalPlus):
        return check_evalplus(box, program, tests)
    if isinstance(tests, Asserts):
        return _check_asserts(box, program, tests)
    if isinstance(tests, Calls):
        return _check_calls(box, program, tests)
    for place, (given, expected) in enumerate(zip(tests.inputs, tests.outputs, strict=True), 1):
        outcome = box.read_stdin(program, given, SECONDS)
        where = f"test {place} of {len(tests.inputs)}, input {shown(given)}"
        if outcome.status != "ok":
            raise ProgramError(f"{where}: {outcome.reason}")
        if not same_output(outcome.output, expected):
            raise ProgramError(f"{where}: expected {shown(expected)}, got {shown(outcome.output)}")
    return len(tests.inputs)


def same_output(output: str, expected: str) -> bool:
    """Same words whatever the blanks between them; numbers with a point to 1e-6."""
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


def _check_asserts(box: Sandbox, program: str, tests: Asserts) -> int:
    try:
        box.check_asserts(program, tests.asserts, SECONDS)
    except ProgramError as error:
        failing = "".join(f"{shown(x)}: " for x in tests.asserts[error.passed :][:1])
        where = f"assert {error.passed + 1} of {len(tests.asserts)}"
        raise ProgramError(f"{where}, {failing}{error}") from None
    return len(tests.asserts)


def _check_calls(box: Sandbox, program: str, tests: Calls) -> int:
    limits, passed = [SECONDS] * len(tests.inputs), 0
    try:
        results = box.call(
            program, tests.function, tests.inputs, limits, SECONDS_IN_ALL, methods=True
        )
        for passed, (value, expected) in enumerate(zip(results, tests.outputs, strict=True)):
            got = _as_json(value[0])
            if got != expected and [got] != expected:
                raise ProgramError(f"expected {shown(expected)}, got {shown(got)}", passed)
    except ProgramError as error:
        given = "".join(f", input {shown(x)}" for x in tests.inputs[error.passed :][:1])
        where = f"test {error.passed + 1} of {len(tests.inputs)}{given}"
        raise ProgramError(f"{where}: {error}") from None
    return len(tests.inputs)


def _as_json(value: Any) -> Any:
    """Tuples as lists, which is all that the data can hold."""
    if isinstance(value, (list, tuple)):
        return [_as_json(item) for item in value]
    if isinstance(value, dict):
        return {str(key): _as_json(item) for key, item in value.items()}
    return value
