"""Is an answer right? One grader per kind of problem, chosen by the problem's `source`."""

from __future__ import annotations

from collections.abc import Callable

from iwopd_megatron import toy_task
from iwopd_megatron.errors import RecipeError

GRADERS: dict[str, Callable[[str, str], bool]] = {toy_task.SOURCE: toy_task.is_right}


def grade(source: str, response: str, answer: str) -> float:
    """1.0 if the response solves the problem, else 0.0; `source` picks the grader."""
    if source not in GRADERS:
        raise RecipeError(f"no grader for source '{source}'; known sources: {', '.join(GRADERS)}.")
    return float(GRADERS[source](response, answer))
