"""EvalPlus's base and plus tests by EvalPlus's own rules, on results that left the sandbox.

EvalPlus compares in a process of its own what the program returned, replayed; the program itself
never shares one with expected results.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from iwopd_megatron.errors import UserError
from iwopd_megatron.grading.code.cases import EvalPlus
from iwopd_megatron.grading.code.evalplus_text import needed_part
from iwopd_megatron.grading.code.sandbox import ProgramError, Sandbox, SandboxError, sandbox
from iwopd_megatron.grading.code.sandbox_values import MAX_ITEMS
from iwopd_megatron.grading.code.shown import shown

REFERENCE_SECONDS = 300.0  # for the canonical solution, which sets the limits of others
replayed: Any = iter(())  # what the function under test returned, for EvalPlus to look at


def check_evalplus(box: Sandbox, program: str, tests: EvalPlus) -> int:
    """The number of tests; ProgramError unless the program passes them all."""
    try:
        import evalplus.eval  # noqa: F401
    except ImportError:
        raise UserError(
            "EvalPlus is not installed; run pip install --no-deps evalplus==0.3.1 and "
            "pip install iwopd-megatron[eval]."
        ) from None
    code = needed_part(program, tests.function)
    for kind, expected in zip(("base", "plus"), _expected(tests), strict=True):
        try:
            _check(box, code, tests, *expected)
        except ProgramError as error:
            where = f"{kind} test {error.passed + 1} of {len(expected[0])}"
            given = "".join(f", input {shown(x)}" for x in expected[0][error.passed :][:1])
            raise ProgramError(f"{where}{given}: {error}", error.passed) from None
    return len(tests.base) + len(tests.plus)


def _check(
    box: Sandbox, code: str, tests: EvalPlus, inputs: list[Any], expected: list[Any],
    reference: list[float],
) -> None:  # fmt: skip
    from evalplus.config import DEFAULT_GT_TIME_LIMIT_FACTOR, DEFAULT_MIN_TIME_LIMIT
    from evalplus.eval import PASS, TIMEOUT, untrusted_check

    global replayed
    limits = [max(DEFAULT_MIN_TIME_LIMIT, DEFAULT_GT_TIME_LIMIT_FACTOR * x) for x in reference]
    in_all = min(60.0, sum(limits)) + 1
    results = box.call(code, tests.function, inputs, limits, in_all, max_items=MAX_ITEMS)
    values = [value for value, _ in results]
    replayed = iter(values)
    replay = (
        f"from {__name__} import replayed\n"
        f"def {tests.function}(*arguments):\n    return next(replayed)"
    )
    dataset = tests.task_id.partition("/")[0].lower()
    status, details = untrusted_check(
        dataset, replay, inputs, tests.function, expected, tests.atol, reference, fast_check=True
    )
    if status == TIMEOUT:
        raise SandboxError(f"{tests.task_id}: EvalPlus did not end comparing results.")
    if status != PASS:
        place = max(len(details) - 1, 0)
        wanted, got = shown(expected[place]), shown(values[place])
        raise ProgramError(f"expected {wanted}, got {got}", place)


@lru_cache(maxsize=64)
def _expected(tests: EvalPlus) -> list[tuple[list[Any], list[Any], list[float]]]:
    """[(inputs, results of the canonical solution, seconds it took)] of base and plus tests."""
    from evalplus.eval import MBPP_OUTPUT_NOT_NONE_TASKS

    is_mbpp, out = tests.task_id.startswith("Mbpp/"), []
    for kind, raw in (("base_input", tests.base), ("plus_input", tests.plus)):
        inputs = _inputs(tests.task_id, raw) if is_mbpp else raw
        with sandbox() as box:
            try:
                results = box.call(
                    tests.reference, tests.function, inputs, [REFERENCE_SECONDS] * len(inputs),
                    REFERENCE_SECONDS, max_items=MAX_ITEMS,
                )  # fmt: skip
            except ProgramError as error:
                raise UserError(
                    f"{tests.task_id}: its canonical solution fails on its own {kind} ({error}); "
                    "the file is damaged."
                ) from None
        values = [value for value, _ in results]
        if is_mbpp and tests.function in MBPP_OUTPUT_NOT_NONE_TASKS:
            values = [value is not None for value in values]
        out.append((inputs, values, [taken for _, taken in results]))
    return out


def _inputs(task_id: str, raw: list[Any]) -> list[Any]:
    """Arguments of every call, with the types that JSON cannot hold."""
    from evalplus.data.mbpp import mbpp_deserialize_inputs

    return mbpp_deserialize_inputs(task_id, raw)
