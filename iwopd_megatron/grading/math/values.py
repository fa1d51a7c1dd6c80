"""LaTeX to sympy by math-verify, and math-verify's verdict on two values, guarded.

math-verify reads the whole answer or nothing: its own fallback to the first number is off.
A list is compared member by member, so that every member passes the guards.
"""

from __future__ import annotations

import logging
import re
from functools import cache, lru_cache
from typing import Any

from iwopd_megatron.grading.math import guards as math_guards
from iwopd_megatron.grading.math.boxes import BOXED

MOST_MEMBERS = 64  # of a list that is matched member by member; longer ones are the engine's alone


@lru_cache(maxsize=64)
def parse(latex: str) -> Any:
    """Return LaTeX as a sympy object; None for what cannot be read, or only by guessing."""
    from math_verify import parse as engine

    # sympy cannot read some answers: no news to anyone
    logging.getLogger("math_verify").setLevel(logging.CRITICAL)
    # math-verify adds numbers that stand side by side as if the second were a fraction
    if not latex or re.search(r"\d\s+\d|\d\s*\\text\s*\{\s*\d", latex):
        return None
    found = engine(
        BOXED + latex + "}",
        extraction_config=_targets(),
        parsing_timeout=None,
        fallback_mode="no_fallback",
        extraction_mode="first_match",
    )
    return _canonical(found[0], latex) if found else None


def is_exact(value: Any) -> bool:
    """Return whether a sympy object is an expression without decimals."""
    import sympy

    return isinstance(value, sympy.Expr) and not value.has(sympy.Float)


@cache
def _targets() -> list[Any]:
    from latex2sympy2_extended.latex2sympy2 import NormalizationConfig
    from math_verify import LatexExtractionConfig

    own = NormalizationConfig(
        basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="last"
    )
    return [LatexExtractionConfig(boxed_match_priority=0, normalization_config=own)]


def _canonical(value: Any, latex: str) -> Any:
    """Return a value with one real symbol for each letter, whatever math-verify assumed of it.

    i becomes the imaginary unit, unless it is an index.
    """
    import sympy

    if not isinstance(value, (sympy.Basic, sympy.MatrixBase)):
        return value
    # an index that is summed over, or one i among other indices, is no imaginary unit
    is_index = re.search(
        r"\\(?:sum|prod|int)|_\{?\s*i|i\s*=|[(,]\s*i\s*[,)]|(?<![a-zA-Z\\])j(?![a-zA-Z])", latex
    )
    change = {
        symbol: sympy.I
        if symbol.name == "i" and not is_index
        else sympy.Symbol(symbol.name, real=True)
        for symbol in value.atoms(sympy.Symbol)
        if not isinstance(symbol, sympy.Dummy)
    }
    return _replaced(value, change)


def _replaced(value: Any, change: dict[Any, Any]) -> Any:
    """Replace symbols within a value; equations and lists keep their shape.

    sympy itself would say that x = (0, 1) is false.
    """
    import sympy
    from sympy.core.relational import Relational

    if isinstance(value, Relational):
        sides = (_replaced(side, change) for side in value.args)
        return type(value)(*sides, evaluate=False)
    if isinstance(value, sympy.FiniteSet):
        return sympy.FiniteSet(*(_replaced(member, change) for member in value.args))
    if isinstance(value, sympy.Interval):
        ends = [_replaced(end, change) for end in value.args[:2]]
        if any(end.has(sympy.I) for end in ends):  # no interval then
            return sympy.Tuple(*ends)
    return value.xreplace(change)


def same(answer: Any, reference: Any) -> bool:
    """Return whether two sympy objects are equal: math-verify says so and no guard objects."""
    import sympy

    if isinstance(answer, sympy.Equality) and isinstance(reference, sympy.Equality):
        if answer.lhs == reference.lhs:
            return same(answer.rhs, reference.rhs)
    elif isinstance(answer, sympy.FiniteSet) and isinstance(reference, sympy.FiniteSet):
        if max(len(answer), len(reference)) <= MOST_MEMBERS:
            return _same_members(list(answer), list(reference))
    elif (
        isinstance(answer, sympy.FiniteSet)
        and len(answer) == 1
        and answer.args[0] != sympy.S.EmptySet
    ):
        return same(answer.args[0], reference)
    elif (
        isinstance(reference, sympy.FiniteSet)
        and len(reference) == 1
        and reference.args[0] != sympy.S.EmptySet
    ):
        return same(answer, reference.args[0])
    elif isinstance(answer, sympy.Tuple) and isinstance(reference, sympy.Tuple):
        return len(answer) == len(reference) and all(map(same, answer, reference))
    elif isinstance(answer, sympy.MatrixBase) and isinstance(reference, sympy.MatrixBase):
        return answer.shape == reference.shape and all(map(same, answer.flat(), reference.flat()))
    elif isinstance(answer, sympy.Interval) and isinstance(reference, sympy.Interval):
        openness = [(x.left_open, x.right_open) for x in (answer, reference)]
        ends = same(answer.start, reference.start) and same(answer.end, reference.end)
        return openness[0] == openness[1] and ends
    return _verified(answer, reference)


def _same_members(answer: list[Any], reference: list[Any]) -> bool:
    """Return whether every member has its own counterpart on the other side."""
    if len(answer) != len(reference):
        return False
    rest = list(reference)
    for member in answer:
        place = next((i for i, other in enumerate(rest) if same(member, other)), None)
        if place is None:
            return False
        del rest[place]
    return True


def _verified(answer: Any, reference: Any) -> bool:
    from math_verify import verify

    return verify([reference], [answer], timeout_seconds=None) and math_guards.agree(
        answer, reference
    )
