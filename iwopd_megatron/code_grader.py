"""Programs in answers, run in a sandbox against the tests of their problem.

The answer of a problem is one JSON object:
    {"task_id", "entry_point", "prompt", "canonical_solution", "base_input", "plus_input", "atol"}
        a line of EvalPlus's files; EvalPlus's own rules decide whether results are the expected
    {"inputs": [...], "outputs": [...]}               standard input and output (Eurus)
    {"fn_name", "inputs": [[...], ...], "outputs": [...]}     calls of a function (Eurus)
    {"asserts": ["assert f(1) == 2", ...]}
The program under test never shares a process with expected results, asserts excepted: what it
returned is replayed to EvalPlus.
"""

from __future__ import annotations

import json
import math
import re
from functools import lru_cache
from typing import Any

from iwopd_megatron.errors import RecipeError, UserError
from iwopd_megatron.sandbox import Sandbox, sandbox

SECONDS = 10.0  # processor seconds of one Eurus test, or of all assertions
REFERENCE_SECONDS = 300.0  # for the canonical solution, which sets the limits of others
FENCED = re.compile(r"```[^\n`]*\n(.*?)(?:```|\Z)", re.DOTALL)
replayed: Any = iter(())  # what the function under test returned, for EvalPlus to look at


def is_right(response: str, answer: str) -> bool:
    """Whether the program in the response passes all tests of the answer."""
    tests = json.loads(answer)
    code = extract_code(response, tests.get("entry_point") or tests.get("fn_name"))
    with sandbox() as box:
        if "entry_point" in tests:
            return _passes_evalplus(box, code, answer)
        if "asserts" in tests:
            return box.passes(code, tests["asserts"], SECONDS)
        pairs = list(zip(tests["inputs"], tests["outputs"], strict=True))
        if tests.get("fn_name"):
            return _calls_match(box, code, tests["fn_name"], pairs)
        return all(_prints(box, code, given, expected) for given, expected in pairs)


def explain(response: str, answer: str) -> tuple[bool, str]:
    """Whether the program passes, and a sentence on it; RecipeError for tests of no known form."""
    tests = json.loads(answer)
    if not tests.keys() & {"entry_point", "asserts", "inputs"}:
        raise RecipeError("the tests have neither 'entry_point' nor 'asserts' nor 'inputs'.")
    if is_right(response, answer):
        return True, "the program passes all tests"
    return False, "the program does not pass all tests"


def extract_code(response: str, function: str | None = None) -> str:
    """The last fenced block (that defines `function`, if one does), or the whole response."""
    blocks = FENCED.findall(response)
    if function is not None:
        defining = re.compile(rf"^\s*def\s+{re.escape(function)}\b", re.MULTILINE)
        blocks = [block for block in blocks if defining.search(block)] or blocks
    return blocks[-1] if blocks else response


def _prints(box: Sandbox, code: str, given: Any, expected: Any) -> bool:
    outcome = box.read_stdin(code, _text(given), SECONDS)
    return outcome.status == "ok" and same_output(outcome.output, _text(expected))


def _text(lines: Any) -> str:
    return "\n".join(map(str, lines)) if isinstance(lines, list) else str(lines)


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


def _calls_match(box: Sandbox, code: str, name: str, pairs: list[tuple[Any, Any]]) -> bool:
    results = box.call(code, name, [given for given, _ in pairs], [SECONDS] * len(pairs), 60)
    if results is None:
        return False
    values = [_as_json(value) for value, _ in results]
    return all(
        value == expected or [value] == expected
        for value, (_, expected) in zip(values, pairs, strict=True)
    )


def _as_json(value: Any) -> Any:
    """Tuples as lists, which is all that the data can hold."""
    if isinstance(value, (list, tuple)):
        return [_as_json(item) for item in value]
    if isinstance(value, dict):
        return {str(key): _as_json(item) for key, item in value.items()}
    return value


def _passes_evalplus(box: Sandbox, code: str, answer: str) -> bool:
    """EvalPlus's base and plus tests, each with a process of its own, as EvalPlus does."""
    try:
        from evalplus.config import DEFAULT_GT_TIME_LIMIT_FACTOR, DEFAULT_MIN_TIME_LIMIT
        from evalplus.eval import PASS, untrusted_check
    except ImportError:
        raise UserError(
            "EvalPlus is not installed; run pip install --no-deps evalplus==0.3.1 and "
            "pip install iwopd-megatron[eval]."
        ) from None

    global replayed
    problem = json.loads(answer)
    dataset = problem["task_id"].partition("/")[0].lower()
    name = problem["entry_point"]
    for inputs, expected, reference in _expected(answer):
        limits = [
            max(DEFAULT_MIN_TIME_LIMIT, DEFAULT_GT_TIME_LIMIT_FACTOR * taken) for taken in reference
        ]
        results = box.call(code, name, inputs, limits, min(60.0, sum(limits)) + 1)
        if results is None:
            return False
        replayed = iter([value for value, _ in results])
        replay = (
            f"from {__name__} import replayed\ndef {name}(*arguments):\n    return next(replayed)"
        )
        status, _ = untrusted_check(
            dataset, replay, inputs, name, expected, problem["atol"], reference, fast_check=True
        )
        if status != PASS:
            return False
    return True


@lru_cache(maxsize=64)
def _expected(answer: str) -> list[tuple[list[Any], list[Any], list[float]]]:
    """[(inputs, results of the canonical solution, seconds it took)] of base and plus tests."""
    from evalplus.eval import MBPP_OUTPUT_NOT_NONE_TASKS

    problem = json.loads(answer)
    code, name = problem["prompt"] + problem["canonical_solution"], problem["entry_point"]
    out = []
    for kind in ("base_input", "plus_input"):
        inputs = _inputs(problem, kind)
        with sandbox() as box:
            results = box.call(
                code, name, inputs, [REFERENCE_SECONDS] * len(inputs), REFERENCE_SECONDS
            )
        if results is None:
            raise UserError(
                f"{problem['task_id']}: its canonical solution fails on its own {kind}; "
                "the file is damaged."
            )
        values = [value for value, _ in results]
        if problem["task_id"].startswith("Mbpp/") and name in MBPP_OUTPUT_NOT_NONE_TASKS:
            values = [value is not None for value in values]
        out.append((inputs, values, [taken for _, taken in results]))
    return out


def _inputs(problem: dict[str, Any], kind: str) -> list[Any]:
    """Arguments of every call, with the types that JSON cannot hold."""
    if not problem["task_id"].startswith("Mbpp/"):
        return problem[kind]
    from evalplus.data.mbpp import mbpp_deserialize_inputs

    return mbpp_deserialize_inputs(problem["task_id"], problem[kind])
