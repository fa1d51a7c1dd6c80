"""EvalPlus's base and plus tests by EvalPlus's own rules, on results that left the sandbox.

EvalPlus compares in a process of its own what the program returned, replayed; the program itself
never shares one with expected results.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from iwopd_megatron.errors import UserError
from iwopd_megatron.grading.code.cases import EvalPlusCases
from iwopd_megatron.grading.code.evalplus_text import needed_part
from iwopd_megatron.grading.code.sandbox import ProgramError, Sandbox, SandboxError, sandbox
from iwopd_megatron.grading.code.sandbox_values import MAX_ITEMS
from iwopd_megatron.grading.code.shown import shown

REFERENCE_SECONDS = 300.0  # for the canonical solution, which sets the limits of others
replayed: Any = iter(())  # what the function under test returned, for EvalPlus to look at


def check_evalplus(box: Sandbox, program: str, cases: EvalPlusCases) -> int:
    """Return the number of test cases; ProgramError unless the program passes them all.

    UserError where EvalPlus is not installed.
    """
    try:
        import evalplus.eval  # noqa: F401
    except ImportError:
        raise UserError(
            "EvalPlus is not installed; run pip install --no-deps evalplus==0.3.1 and "
            "pip install iwopd-megatron[eval]."
        ) from None
    code = needed_part(program, cases.function)
    for kind, expected in zip(("base", "plus"), _expected(cases), strict=True):
        try:
            _check(box, code, cases, *expected)
        except ProgramError as error:
            where = f"{kind} test {error.passed + 1} of {len(expected[0])}"
            given = "".join(f", input {shown(x)}" for x in expected[0][error.passed :][:1])
            raise ProgramError(f"{where}{given}: {error}", error.passed) from None
    return len(cases.base) + len(cases.plus)


def _check(
    box: Sandbox,
    code: str,
    cases: EvalPlusCases,
    inputs: list[Any],
    expected: list[Any],
    reference: list[float],
) -> None:
    """Call the program and compare; `reference` are the canonical solution's seconds a call."""
    from evalplus.config import DEFAULT_GT_TIME_LIMIT_FACTOR, DEFAULT_MIN_TIME_LIMIT
    from evalplus.eval import PASS, TIMEOUT, untrusted_check

    global replayed
    limits = [max(DEFAULT_MIN_TIME_LIMIT, DEFAULT_GT_TIME_LIMIT_FACTOR * x) for x in reference]
    in_all = min(60.0, sum(limits)) + 1
    results = box.call(code, cases.function, inputs, limits, in_all, max_items=MAX_ITEMS)
    values = [value for value, _ in results]
    replayed = iter(values)
    replay = (
        f"from {__name__} import replayed\n"
        f"def {cases.function}(*arguments):\n    return next(replayed)"
    )
    dataset = cases.task_id.partition("/")[0].lower()
    status, details = untrusted_check(
        dataset, replay, inputs, cases.function, expected, cases.atol, reference, fast_check=True
    )
    if status == TIMEOUT:
        raise SandboxError(f"{cases.task_id}: EvalPlus did not end comparing results.")
    if status != PASS:
        place = max(len(details) - 1, 0)
        wanted, got = shown(expected[place]), shown(values[place])
        raise ProgramError(f"expected {wanted}, got {got}", place)


@lru_cache(maxsize=64)
def _expected(cases: EvalPlusCases) -> list[tuple[list[Any], list[Any], list[float]]]:
    """Return (inputs, results of the canonical solution, its seconds a call): base, then plus."""
    from evalplus.eval import MBPP_OUTPUT_NOT_NONE_TASKS

    is_mbpp, out = cases.task_id.startswith("Mbpp/"), []
    for kind, raw in (("base_input", cases.base), ("plus_input", cases.plus)):
        inputs = _inputs(cases.task_id, raw) if is_mbpp else raw
        with sandbox() as box:
            try:
                results = box.call(
                    cases.reference,
                    cases.function,
                    inputs,
                    [REFERENCE_SECONDS] * len(inputs),
                    REFERENCE_SECONDS,
                    max_items=MAX_ITEMS,
                )
            except ProgramError as error:
                raise UserError(
                    f"{cases.task_id}: its canonical solution fails on its own {kind} ({error}); "
                    "the file is damaged."
                ) from None
        values = [value for value, _ in results]
        if is_mbpp and cases.function in MBPP_OUTPUT_NOT_NONE_TASKS:
            values = [value is not None for value in values]
        out.append((inputs, values, [taken for _, taken in results]))
    return out


def _inputs(task_id: str, raw: list[Any]) -> list[Any]:
    """Return the arguments of every call, with the types that JSON cannot hold."""
    from evalplus.data.mbpp import mbpp_deserialize_inputs

    return mbpp_deserialize_inputs(task_id, raw)
