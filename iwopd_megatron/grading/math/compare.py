"""Whether two answers say the same.

Where a spelling has several readings, all are tried, the same one on both sides:
    `\\log`        base 10, or natural (right if it fits under either)
    `1,234`       a number; a list beside a list
    `3,14`        a list; a decimal beside the decimal 3.14
    `50\\%`        50, or 0.5; two percentages as they stand
    `45^\\circ`    45, or \\pi/4; two angles in degrees as they stand
    `\\pm a`       both signs, everywhere the same one
    a column      a matrix; a tuple beside a tuple
    `x = a`       a beside an answer without a name; two names must be the same
    `x = 1, y = 2`  by name, or in this order beside a tuple
A set in braces is no tuple and no interval; three capitals or more are a word, no product.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from iwopd_megatron.grading.math import kinds as math_kinds
from iwopd_megatron.grading.math import units as math_units
from iwopd_megatron.grading.math import words as math_words
from iwopd_megatron.grading.math.guards import decimals
from iwopd_megatron.grading.math.lists import both_signs, inside, members, named_values
from iwopd_megatron.grading.math.numbers import GROUPED, INDIAN
from iwopd_megatron.grading.math.readings import Reading, read
from iwopd_megatron.grading.math.regions import RELATION, same_region
from iwopd_megatron.grading.math.values import parse, same

ORDER = re.compile(r"[A-Z]{3,}")  # an order or a word: its letters are no factors
FUNCTION = re.compile(r"\\(?:a?rc)?(?:sin|cos|tan|cot|sec|csc)(?![a-zA-Z])")
LOGARITHM = re.compile(r"\\log(?![a-zA-Z]|\s*_)")
REGION = re.compile(
    rf"{RELATION.pattern}|\\in(?![a-zA-Z])|\\cup|\\setminus|\\mathbb|\\\{{.*(?::|\\mid)"
)
COLUMN = re.compile(
    r"\\begin\{pmatrix\}((?:(?!\\begin|&).)*\\\\(?:(?!\\begin|&).)*)\\end\{pmatrix\}"
)
# members that are more than expressions
MARKED = re.compile(r"\\text|\\circ|%|\\\$|_|\d\s*[A-Za-z]{2}")


def equal(answer: Reading, reference: Reading) -> bool:
    """Return whether the answer says what the reference does."""
    if not answer.whole or not reference.whole:
        return False
    if _bare(answer.whole) == _bare(reference.whole):
        return True
    verdict = _letters(answer, reference)
    if verdict is None:
        verdict = math_kinds.compare(answer.value, reference.value)
    if verdict is None:
        verdict = _words(answer, reference)
    if verdict is None:
        verdict = _systems(answer, reference)
    if verdict is not None:
        return verdict
    equations = [_equation(x) for x in (answer, reference)]
    if all(equations) and answer.name.lower() != reference.name.lower():
        return "'" not in answer.name + reference.name and _same_value(*equations)
    if not math_units.agree(answer.unit, reference.unit):
        return False
    return any(_same_value(*pair) for pair in _pairs(answer, reference)) or _same_members(
        answer, reference
    )


def _equation(reading: Reading) -> str:
    """Return the whole equation of an answer that is one, else ""."""
    if reading.name:
        return f"{reading.name}={reading.value}"
    return reading.value if "=" in reading.value else ""


def _letters(answer: Reading, reference: Reading) -> bool | None:
    """Compare choices by their letters; None unless both have one."""
    if answer.letter and reference.letter:
        return answer.letter == reference.letter
    return None


def _words(answer: Reading, reference: Reading) -> bool | None:
    """Compare words by their meaning; None where neither answer must be words."""
    if ORDER.fullmatch(answer.value) and ORDER.fullmatch(reference.value):
        return _bare(answer.value) == _bare(reference.value)
    if not (math_words.is_word(answer.value) or math_words.is_word(reference.value)):
        return None
    mine = math_words.word(answer.value)
    return mine is not None and mine == math_words.word(reference.value)


def _systems(answer: Reading, reference: Reading) -> bool | None:
    """Compare values by their names, or in their order beside a tuple; None for other answers."""
    mine, theirs = (named_values(x.name, x.value) for x in (answer, reference))
    if mine and theirs and mine.keys() == theirs.keys():
        return all(equal(read(mine[name]), read(theirs[name])) for name in mine)
    values, other = (mine, reference.value) if mine else (theirs, answer.value)
    listed = members(inside(other, "(", ")") or "")
    if not values or (mine and theirs) or len(values) != len(listed):
        return None
    pairs = list(zip(values.values(), listed, strict=True))
    return all(_same_value(*(pair if mine else pair[::-1])) for pair in pairs)


def _pairs(answer: Reading, reference: Reading) -> Iterator[tuple[str, str]]:
    """Yield pairs of values to compare: as they stand, and in every other reading."""
    mine, theirs = both_signs(answer.value), both_signs(reference.value)
    if {answer.unit, reference.unit} != {"degree", "rad"}:
        yield _radians(mine), _radians(theirs)
    if (answer.unit == "percent") != (reference.unit == "percent"):
        yield _hundredths(mine, answer.unit), _hundredths(theirs, reference.unit)
    if (answer.unit == "degree") != (reference.unit == "degree"):
        yield _angle(mine, answer.unit), _angle(theirs, reference.unit)
    if "^\\circ" in mine + theirs and not FUNCTION.search(mine + theirs):
        yield mine.replace("^\\circ", ""), theirs.replace("^\\circ", "")
    if LOGARITHM.search(mine) or LOGARITHM.search(theirs):
        yield LOGARITHM.sub(r"\\ln", mine), LOGARITHM.sub(r"\\ln", theirs)
    yield from _commas(answer, reference)
    for x, y in ((mine, theirs), (theirs, mine)):
        matrix = COLUMN.fullmatch(x)
        if matrix and inside(y, "(", ")"):
            column = "(" + matrix[1].replace(r"\\", ",") + ")"
            yield (column, y) if x is mine else (y, column)


def _hundredths(value: str, unit: str) -> str:
    """Return a percentage as a fraction, another value as it is."""
    return rf"\frac{{{value}}}{{100}}" if unit == "percent" else value


def _angle(value: str, unit: str) -> str:
    """Return an angle in degrees as a multiple of pi, another value as it is."""
    return rf"({value})\frac{{\pi}}{{180}}" if unit == "degree" else value


def _commas(answer: Reading, reference: Reading) -> Iterator[tuple[str, str]]:
    """Yield pairs in which commas between digits are read as a list, or as a decimal comma.

    `normalise` has taken them for groups of thousands.
    """
    for mine, theirs in ((answer, reference), (reference, answer)):
        written = re.sub(r"\s", "", mine.raw)
        if GROUPED.match(written) or INDIAN.match(written):
            as_list, as_number = written.replace(",", ", "), written.replace(",", "")
            other = theirs.value
            is_list = len(members(inside(other, r"\{", r"\}") or other)) > 1
            one = as_list if is_list else as_number
            yield (one, other) if mine is answer else (other, one)
    if re.fullmatch(r"-?\d+,\d+", answer.value) and re.fullmatch(r"-?\d+\.\d+", reference.value):
        yield answer.value.replace(",", "."), reference.value


def _radians(text: str) -> str:
    """Return an expression with the angles in degrees within it as multiples of pi."""
    if not FUNCTION.search(text):
        return text
    return re.sub(
        r"(\d+(?:\.\d+)?|\\frac\{\d+\}\{\d+\}|\([^()]*\)|\{[^{}]*\})\s*\^\\circ",
        r"(\\frac{\1\\pi}{180})",
        text,
    )


def _same_value(answer: str, reference: str) -> bool:
    if answer and _bare(answer) == _bare(reference):
        return True
    if any(_is_set(x) and _is_tuple(y) for x, y in ((answer, reference), (reference, answer))):
        return False
    verdict = decimals(answer, reference)
    if verdict is not None:
        return verdict
    mine, theirs = parse(answer), parse(reference)
    if mine is not None and theirs is not None and same(mine, theirs):
        return True
    if REGION.search(answer) or REGION.search(reference):
        return same_region(answer, reference)
    return False


def _is_set(text: str) -> bool:
    return len(members(inside(text, r"\{", r"\}") or "")) > 1


def _is_tuple(text: str) -> bool:
    brackets = (inside(text, opening, closing) for opening in "([" for closing in ")]")
    return any(len(members(found or "")) > 1 for found in brackets)


def _same_members(answer: Reading, reference: Reading) -> bool:
    """Return whether two lists agree member by member.

    Only for members that have units, bases or words.
    """
    if not MARKED.search(answer.whole + reference.whole):
        return False
    mine, theirs = (members(inside(x.whole, r"\{", r"\}") or x.whole) for x in (answer, reference))
    if len(mine) != len(theirs) or len(mine) < 2:
        return False
    rest = [read(member) for member in theirs]
    for member in map(read, mine):
        place = next((i for i, other in enumerate(rest) if equal(member, other)), None)
        if place is None:
            return False
        del rest[place]
    return True


def _bare(text: str) -> str:
    return re.sub(r"\s", "", text)
