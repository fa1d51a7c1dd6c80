"""The test cases of a code problem: its reference answer, read and checked.

An answer is one JSON object of one of these shapes:
    {"task_id", "entry_point", "prompt", "canonical_solution", "base_input", "plus_input", "atol"}
        a line of EvalPlus's files
    {"inputs": [...], "outputs": [...]}     standard input and output: texts, or lists of lines
    {"fn_name", "inputs": [...], "outputs": [...]}      calls of a function
        an input is a list of arguments, or (LiveCodeBench, PRIME) a text with one JSON value a
        line, in which case the output is JSON too
    {"asserts": ["assert f(1) == 2", ...]}
A key that is null counts as absent, as in a table with columns for several shapes.
"""

from __future__ import annotations

import ast
import json
import warnings
from dataclasses import dataclass
from typing import Any

from iwopd_megatron.errors import RecipeError
from iwopd_megatron.grading.code.program_text import parse
from iwopd_megatron.grading.code.sandbox_values import long_numbers

EVALPLUS_KEYS = "task_id entry_point prompt canonical_solution base_input plus_input atol".split()
SHAPES = (
    "the keys inputs and outputs (and fn_name for calls of a function), or asserts, or those of "
    "EvalPlus's files"
)


@dataclass(frozen=True)
class EvalPlusCases:
    """Base and plus test cases of EvalPlus; `text` is the answer that they were read from."""

    text: str
    task_id: str
    function: str
    reference: str  # the prompt and the canonical solution after it
    base: list[Any]
    plus: list[Any]
    atol: float

    def __hash__(self) -> int:
        return hash(self.text)


@dataclass(frozen=True)
class StdinCases:
    """Texts on standard input, and what a program has to print for each."""

    inputs: list[str]
    outputs: list[str]


@dataclass(frozen=True)
class CallCases:
    """Lists of arguments of a function or method, and what it has to return for each."""

    function: str
    inputs: list[list[Any]]
    outputs: list[Any]


@dataclass(frozen=True)
class AssertCases:
    """Statements that hold after the program; `functions` are the names that they call."""

    asserts: list[str]
    functions: frozenset[str]


TestCases = EvalPlusCases | StdinCases | CallCases | AssertCases


def check_test_cases(answer: str) -> None:
    """Refuse an answer that no program can be tested with; RecipeError says what is wrong."""
    read_test_cases(answer)


_KEYS = (
    {"asserts"},
    {"task_id", "canonical_solution", "base_input", "plus_input"},
    {"inputs", "outputs"},
)


@long_numbers()
def read_test_cases(answer: str) -> TestCases:
    """Return the test cases of an answer; RecipeError if it holds none, or faulty ones."""
    try:
        found = json.loads(answer, parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        raise RecipeError(
            f"answer is not JSON ({error}); a code problem needs an object with {SHAPES}."
        ) from None
    if not isinstance(found, dict):
        raise RecipeError(
            f"answer is JSON but {_kind(found)}; a code problem needs an object with {SHAPES}."
        )
    found = {key: value for key, value in found.items() if value is not None}
    shapes = [sorted(found.keys() & keys) for keys in _KEYS]
    if sum(map(bool, shapes)) > 1:
        first, second = [keys[0] for keys in shapes if keys][:2]
        raise RecipeError(
            f"answer has '{first}' and '{second}', tests of two kinds; keep one of them."
        )
    if "asserts" in found:
        return _asserts(found["asserts"])
    if shapes[1]:
        return _evalplus(found, answer)
    if shapes[2]:
        return _pairs(found)
    names = f"only {', '.join(sorted(found))}" if found else "it is empty"
    raise RecipeError(f"answer has no tests ({names}); a code problem needs {SHAPES}.")


def _no_number(name: str) -> Any:
    raise ValueError(f"{name} is no number of JSON, and no result equals it")


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a text", bool: "true or false"}
    return names.get(type(value), "null" if value is None else "a number")


def _list(found: dict[str, Any], key: str) -> list[Any]:
    """Return the list at a key; RecipeError unless it has something in it."""
    if key not in found:
        raise RecipeError(f"answer lacks '{key}'; a code problem needs {SHAPES}.")
    if not isinstance(found[key], list):
        raise RecipeError(f"answer: {key} is {_kind(found[key])}; it needs a list.")
    if not found[key]:
        raise RecipeError(f"answer: {key} is empty; a problem without tests cannot be graded.")
    return found[key]


def _name(value: Any, key: str) -> str:
    if not isinstance(value, str) or not value.isidentifier():
        raise RecipeError(f"answer: {key} {value!r} is not the name of a function.")
    return value


def _pairs(found: dict[str, Any]) -> StdinCases | CallCases:
    inputs, outputs = _list(found, "inputs"), _list(found, "outputs")
    if len(inputs) != len(outputs):
        raise RecipeError(
            f"answer has {len(inputs)} inputs but {len(outputs)} outputs; it needs one for each."
        )
    if "fn_name" not in found:
        texts = [_text(x, f"inputs[{i}]") for i, x in enumerate(inputs)]
        wanted = [_text(x, f"outputs[{i}]") for i, x in enumerate(outputs)]
        if not any(text.strip() for text in wanted):
            raise RecipeError("answer: all outputs are blank; every silent program would be right.")
        return StdinCases(texts, wanted)
    name = _name(found["fn_name"], "fn_name")
    pairs = [_call(*pair, i) for i, pair in enumerate(zip(inputs, outputs, strict=True))]
    return CallCases(name, [given for given, _ in pairs], [expected for _, expected in pairs])


def _text(value: Any, where: str) -> str:
    """Return a text as it is, a list as lines; RecipeError for anything else."""
    lines = value if isinstance(value, list) else [value]
    for line in lines:
        if isinstance(line, bool) or not isinstance(line, (str, int, float)):
            kind = f"a list with {_kind(line)}" if lines is value else _kind(line)
            raise RecipeError(
                f"answer: {where} is {kind}; without fn_name it needs a text or a list of lines."
            )
    return "\n".join(map(str, lines))


def _call(given: Any, expected: Any, place: int) -> tuple[list[Any], Any]:
    """Return arguments and result; LiveCodeBench's texts, one argument a line, read as JSON."""
    if isinstance(given, list):
        return given, expected
    if not isinstance(given, str):
        raise RecipeError(
            f"answer: inputs[{place}] is {_kind(given)}; a call needs a list of arguments, or a "
            "text with one JSON value a line."
        )
    lines = given.strip().split("\n")
    arguments = [_value(line, f"inputs[{place}] line {i}") for i, line in enumerate(lines, 1)]
    is_text = isinstance(expected, str)
    return arguments, _value(expected, f"outputs[{place}]") if is_text else expected


def _value(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise RecipeError(
            f"answer: {where} {text[:80]!r} is not JSON; where inputs are texts, every line of an "
            "input and every output is one JSON value."
        ) from None


def _asserts(found: Any) -> AssertCases:
    texts = _list({"asserts": found}, "asserts")
    functions: set[str] = set()
    for place, text in enumerate(texts):
        tree = _parsed(text, f"asserts[{place}]")
        checks = [node.test for node in ast.walk(tree) if isinstance(node, ast.Assert)]
        if not checks:
            raise RecipeError(f"answer: asserts[{place}] {text[:80]!r} holds no assert statement.")
        if all(isinstance(check, (ast.Constant, ast.Tuple)) for check in checks):
            raise RecipeError(f"answer: asserts[{place}] {text[:80]!r} tests nothing.")
        calls = [node.func for node in ast.walk(tree) if isinstance(node, ast.Call)]
        functions |= {call.id for call in calls if isinstance(call, ast.Name)}
    return AssertCases(texts, frozenset(functions))


def _parsed(code: Any, where: str) -> ast.Module:
    if not isinstance(code, str):
        raise RecipeError(f"answer: {where} is {_kind(code)}; it needs a text of Python.")
    try:
        tree = parse(code)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            compile(tree, where, "exec", dont_inherit=True)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise RecipeError(f"answer: {where} is not Python ({error}).") from None
    return tree


def _evalplus(found: dict[str, Any], answer: str) -> EvalPlusCases:
    for key in EVALPLUS_KEYS:
        if key not in found:
            raise RecipeError(f"answer lacks '{key}', which a line of EvalPlus's files has.")
    for key in ("task_id", "prompt", "canonical_solution"):
        if not isinstance(found[key], str):
            raise RecipeError(f"answer: {key} is {_kind(found[key])}; it needs a text.")
    task, plus = found["task_id"], found["plus_input"] or []  # {} in one problem of MBPP+
    kind, _, number = task.partition("/")
    if kind not in ("HumanEval", "Mbpp") or not number.isdigit():
        raise RecipeError(f"answer: task_id {task!r} is not HumanEval/NUMBER or Mbpp/NUMBER.")
    if isinstance(found["atol"], bool) or not isinstance(found["atol"], (int, float)):
        raise RecipeError(f"answer: atol is {_kind(found['atol'])}; it needs a number.")
    base = _list(found, "base_input")
    for key, inputs in (("base_input", base), ("plus_input", plus)):
        if not isinstance(inputs, list) or not all(isinstance(x, list) for x in inputs):
            raise RecipeError(f"answer: {key} needs a list of lists of arguments.")
    function = _name(found["entry_point"], "entry_point")
    reference = found["prompt"] + found["canonical_solution"]
    tree = _parsed(reference, "prompt + canonical_solution")
    if function not in {getattr(node, "name", None) for node in tree.body}:
        raise RecipeError(f"answer: the canonical solution does not define {function}.")
    return EvalPlusCases(answer, task, function, reference, base, plus, found["atol"])
