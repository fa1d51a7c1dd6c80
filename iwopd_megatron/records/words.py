"""How accuracies, gains and arms are written wherever a person reads them.

Accuracies are in per cent and differences in points, with one decimal; files hold shares (0 to 1).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

PAPER = "IW-OPD, arXiv 2606.22600"
ARM_NAMES = {
    "opd": "OPD",
    "iw": "IW-OPD",
    "iw_signed": "IW-OPD (signed)",
    "surrogate": "IW-OPD (surrogate)",
    "prefix": "prefix only",
    "suffix": "suffix only",
    "prefix_boost": "prefix boost",
    "log_ratio": "log ratio",
    "ratio_blend": "ratio blend",
    "topk_kl": "top-K KL",
}
ARM_IDS = {"uniform": "opd"}  # uniform token weights are plain OPD
UNKNOWN = "–"


def arm_name(arm: str) -> str:
    """Return the name that people read for an arm's id; with its folder where the id has one."""
    folder, _, rule = arm.rpartition("/")
    name = ARM_NAMES.get(rule, rule)
    return f"{name} ({folder})" if folder else name


def common_name(references: Iterable[str]) -> str:
    """Return the one name of the arms that others are compared with, or "the first arm"."""
    names = {arm_name(arm.rpartition("/")[2]) for arm in references}
    return names.pop() if len(names) == 1 else "the first arm"


def percent(share: float | None) -> str:
    """Write 0.7666 as 76.7, without the sign: headings and sentences have the unit."""
    return UNKNOWN if share is None else _rounded(100 * share, "")


def points(difference: float | None) -> str:
    """Write a difference of two shares, 0.0186 as +1.9."""
    return UNKNOWN if difference is None else _rounded(100 * difference, "+")


def percent_interval(bounds: Sequence[float]) -> str:
    """Write two shares, low and high, as [75.1, 78.2]."""
    return f"[{percent(bounds[0])}, {percent(bounds[1])}]"


def points_interval(bounds: Sequence[float]) -> str:
    """Write two differences, low and high, as [-0.3, +1.9]."""
    return f"[{points(bounds[0])}, {points(bounds[1])}]"


def plus_minus(share: float | None, error: float | None) -> str:
    """Write a share with its standard error, where there is one: 76.7 ± 0.4."""
    return percent(share) + (f" ± {percent(error)}" if error is not None else "")


def counted(number: int, thing: str) -> str:
    """Write a number of things: 1 seed, 2 seeds."""
    return f"{number} {thing}" + ("" if number == 1 else "s")


def listed(parts: Sequence[str], most: int = 4) -> str:
    """Write a list: a, b and c; of a long one the first `most` and how many more."""
    shown = list(parts[:most])
    if len(parts) > most:
        shown.append(f"{len(parts) - most} more")
    return ", ".join(shown[:-1]) + " and " + shown[-1] if len(shown) > 1 else "".join(shown)


def _rounded(value: float, sign: str) -> str:
    return f"{round(value, 1) + 0.0:{sign}.1f}"  # never -0.0
