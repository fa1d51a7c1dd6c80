"""`iwopd grade`: one answer, right or wrong and why; for people who debug their data."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from iwopd_megatron.errors import RecipeError, UserError

app = typer.Typer(
    no_args_is_help=True, help="Grade one answer: right (exit 0) or wrong (exit 1), and why."
)
AS_GIVEN = {"ignore_unknown_options": True}  # -3 is an answer, no option


@app.command("math", context_settings=AS_GIVEN)
def grade_math(
    answer: Annotated[str, typer.Argument(help="LaTeX, or a whole response with a box")],
    reference: Annotated[str, typer.Argument(help="the reference answer, LaTeX")],
) -> None:
    """Compare an answer with a reference answer, as grader `math` does."""
    from iwopd_megatron.grading.graders import grade
    from iwopd_megatron.grading.math.boxes import last_boxed
    from iwopd_megatron.grading.math.grader import explain
    from iwopd_megatron.grading.pool import Submission

    if not reference.strip():
        raise RecipeError("the reference answer is empty; write what the answer should be.")
    response = answer if last_boxed(answer) is not None else f"\\boxed{{{answer}}}"
    found = grade([Submission("math", response, reference)])[0]
    reason = f"grading was {found.trouble}" if found.trouble else explain(response, reference)
    _tell(bool(found.right), reason)


@app.command("code")
def grade_code(
    response_file: Annotated[Path, typer.Argument(help="a whole response, or the program alone")],
    tests_file: Annotated[Path, typer.Argument(help="the problem's answer: tests as JSON")],
) -> None:
    """Run the program of a response against tests, as grader `code` does."""
    from iwopd_megatron.grading.code import grader as code_grader
    from iwopd_megatron.grading.code.sandbox import SandboxError

    response, tests = _text(response_file), _text(tests_file)
    try:
        is_object = isinstance(json.loads(tests), dict)
    except json.JSONDecodeError as error:
        raise RecipeError(
            f"{tests_file} is not JSON ({error.msg}, line {error.lineno}); "
            "write the tests as one JSON object."
        ) from None
    if not is_object:
        raise RecipeError(f"{tests_file} is JSON, but no object; write the tests as one object.")
    try:
        right, reason = code_grader.explain(response, tests)
    except (UserError, SandboxError) as error:  # exit code 1 would say that the program is wrong
        raise RecipeError(str(error)) from error
    _tell(right, reason)


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        what = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise RecipeError(f"{file} cannot be read: {what}.") from None


def _tell(right: bool, reason: str) -> None:
    print(f"{'right' if right else 'wrong'}: {reason}")
    sys.exit(0 if right else 1)
