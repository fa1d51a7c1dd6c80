"""Guards after math-verify, which compares to an absolute 1e-15 or to six decimal places.

Two exact values (no decimal point) must be equal: as rationals, or to 40 significant figures,
relative to their size. Two decimals, or a decimal and a fraction that terminates, must be equal
too, or the one with fewer places (six at least, and six figures) is the other one rounded.
A decimal beside any other exact value (1/3, a root) agrees with it to six places and has at least
five significant figures. Expressions with letters are compared at fixed values of the letters.
"""

from __future__ import annotations

import re
from typing import Any

FIGURES = 60  # that exact values are computed to; 40 of them must agree
EXACT, ROUNDED = 1e-40, 5e-5
PLACES, SIGNIFICANT, SIGNIFICANT_BESIDE_EXACT = 6, 6, 5


def decimals(answer: str, reference: str) -> bool | None:
    """Return whether two decimals as written are equal or one is the other rounded.

    None where either text is no decimal.
    """
    import sympy

    if not all(re.fullmatch(r"[-+]?\d*\.\d+", text) for text in (answer, reference)):
        return None
    left, right = map(sympy.Rational, (answer, reference))
    if left == right:
        return True
    short = min((answer, reference), key=lambda text: len(text.partition(".")[2]))
    places = [len(text.partition(".")[2]) for text in (answer, reference)]
    figures = len(re.sub(r"\D", "", short).lstrip("0"))
    is_rounded = bool(abs(left - right) * 2 * 10 ** min(places) <= 1)
    return (
        places[0] != places[1] and min(places) >= PLACES and figures >= SIGNIFICANT and is_rounded
    )


def agree(answer: Any, reference: Any) -> bool:
    """Return whether two sympy values that math-verify takes for equal pass the guards."""
    import sympy

    if isinstance(answer, sympy.Equality) and isinstance(reference, sympy.Equality):
        return _same_equations(answer, reference)
    if isinstance(answer, sympy.Equality):
        return agree(answer.rhs, reference)
    if isinstance(reference, sympy.Equality):
        return agree(answer, reference.rhs)
    if not (isinstance(answer, sympy.Expr) and isinstance(reference, sympy.Expr)):
        return True
    # an integral is math-verify's to judge: its value here is as exact as its quadrature
    unevaluated = (sympy.Integral, sympy.Sum, sympy.Product, sympy.Limit, sympy.Derivative)
    if answer.has(*unevaluated) or reference.has(*unevaluated):
        return True
    return _agree(answer, reference)


def _same_equations(answer: Any, reference: Any) -> bool:
    """Return whether two equations say the same in the same letters.

    math-verify takes two equations without solutions for equal, whatever they say.
    """
    import sympy

    if answer.lhs == reference.lhs:
        return agree(answer.rhs, reference.rhs)
    sides = [(x.lhs, x.rhs) for x in (answer, reference)]
    if not all(isinstance(side, sympy.Expr) for pair in sides for side in pair):
        return False
    letters = [x.free_symbols for x in (answer, reference)]
    if letters[0] != letters[1] or not letters[0]:
        return False
    mine, theirs = (left - right for left, right in sides)
    factor = sympy.simplify(mine / theirs)
    return (factor.is_number and factor.is_nonzero) or bool(
        sympy.solve(reference, *reference.free_symbols)
    )


def _agree(answer: Any, reference: Any) -> bool:
    import sympy

    values = {
        symbol: sympy.Rational(37 + 10 * place, 29)
        for place, symbol in enumerate(
            sorted(answer.free_symbols | reference.free_symbols, key=str)
        )
    }
    left, right = (_exact(x).xreplace(values) for x in (answer, reference))
    decimals = [x.has(sympy.Float) for x in (answer, reference)]
    if left.has(sympy.core.function.AppliedUndef) or right.has(sympy.core.function.AppliedUndef):
        return True
    left, right = left.doit(), right.doit()
    if left.is_Rational and right.is_Rational:
        return left == right or (any(decimals) and not values and _rounded(left, right))
    if not any(decimals):
        return _is_close(left, right, EXACT)
    is_lone = not values and _figures(left if decimals[0] else right) >= SIGNIFICANT_BESIDE_EXACT
    return _is_close(left, right, ROUNDED if is_lone else EXACT)


def _exact(value: Any) -> Any:
    """Return a value with its decimals replaced by the fractions that they write."""
    import sympy

    return value.xreplace({x: sympy.Rational(str(x)) for x in value.atoms(sympy.Float)})


def _rounded(left: Any, right: Any) -> bool:
    """Return whether one rational is the other rounded, with enough places and figures."""
    mine, theirs = _places(left), _places(right)
    if mine is None or theirs is None:  # it does not terminate: math-verify has compared six places
        decimal = left if theirs is None else right
        return _figures(decimal) >= SIGNIFICANT_BESIDE_EXACT and _is_close(left, right, ROUNDED)
    short, long = (left, right) if mine < theirs else (right, left)
    kept = min(mine, theirs)
    if kept < PLACES or _figures(short) < SIGNIFICANT:
        return False
    return abs(short - long) * 2 * 10**kept <= 1


def _places(value: Any) -> int | None:
    """Return the decimal places of a rational; None if it does not terminate."""
    rest, twos, fives = value.q, 0, 0
    while rest % 2 == 0:
        rest, twos = rest // 2, twos + 1
    while rest % 5 == 0:
        rest, fives = rest // 5, fives + 1
    return max(twos, fives) if rest == 1 else None


def _figures(value: Any) -> int:
    """Return the significant figures of a terminating decimal as written; 0 for others."""
    places = _places(value) if value.is_Rational else None
    return 0 if places is None else len(str(abs(value.p) * 10**places // value.q))


def _is_close(left: Any, right: Any, tolerance: float) -> bool:
    """Return whether |left - right| is within `tolerance` times the larger one.

    True where either has no numerical value.
    """
    if not (left.is_number and right.is_number):
        return True
    if left.is_infinite or right.is_infinite or left.is_zero or right.is_zero:
        return left == right or bool((left - right).equals(0))
    size = max(abs(left.evalf(FIGURES)), abs(right.evalf(FIGURES)))
    return bool(abs((left - right).evalf(FIGURES)) <= tolerance * size)
