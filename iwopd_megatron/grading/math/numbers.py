"""Spellings of numbers, made one: `1\\,234` and `1{,}234` are 1234, `1.5e3` is a product.

Each function is one spelling; plain_numbers applies them in the order in which they must come.
"""

from __future__ import annotations

import re
from math import prod

from iwopd_megatron.grading.math.boxes import closing

DIGITS = r"(?<![\d.,])[1-9]\d{0,2}"
GROUPED = re.compile(rf"^-?{DIGITS}(?:,\d{{3}})+(?:\.\d+)?$")
INDIAN = re.compile(r"^-?[1-9]\d?(?:,\d{2})+,\d{3}$")
OPTION = re.compile(r"(?:\s*\[[^\]]*\])?")  # the degree of a root
TOKEN = re.compile(r"\w|\\[a-zA-Z]+(?:\{[^{}]*\})*")
POWERS = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12}
MOST_DOUBLE_FACTORIAL = 3000


def plain_numbers(text: str) -> str:
    """Rewrite numbers with digits, decimal points, fractions and powers of ten only."""
    for spelling in (
        _fractions,
        _separators,
        _repeating,
        _scientific,
        _mixed,
        _words,
        _double_factorials,
    ):
        text = spelling(text)
    return text


def _separators(text: str) -> str:
    """Join groups of three digits; `{,}` before anything else is a decimal comma."""
    text = re.sub(r"(?<=\d)\s*\{\s*,\s*\}\s*(?=\d{3}(?:\D|$))", "", text)
    text = re.sub(r"(?<=\d)\{\s*,\s*\}(?=\d)", ".", text)
    # blanks and apostrophes between groups of three
    text = re.sub(rf"{DIGITS}(?: \d{{3}})+(?![\d])", lambda m: m[0].replace(" ", ""), text)
    text = re.sub(rf"{DIGITS}(?:(?:'|\\_)\d{{3}})+(?!\d)", lambda m: re.sub(r"\D", "", m[0]), text)
    # nobody writes a coordinate or a member of a set as 000 or 048: such commas group digits
    text = re.sub(
        rf"{DIGITS}(?:, ?\d{{3}})*, ?0\d\d(?:, ?\d{{3}})*(?![\d,])",
        lambda m: re.sub("[, ]", "", m[0]),
        text,
    )
    # two or more groups of three between points are no decimal
    text = re.sub(r"^(-?[1-9]\d{0,2}(?:\.\d{3}){2,})$", lambda m: m[0].replace(".", ""), text)
    # a number alone, or after an equals sign, with commas between groups of three
    match = re.fullmatch(
        r"(.*[=\s$]|\\\$)?(-?[1-9]\d{0,2}(?:,\d{3})+(?:\.\d+)?)((?![,\d]).*)?", text
    )
    if match and "," not in (match[1] or "") + (match[3] or ""):
        text = (match[1] or "") + match[2].replace(",", "") + (match[3] or "")
    return re.sub(r"^(-?)0+(?=\d)", r"\1", text)


def _repeating(text: str) -> str:
    """Rewrite `0.1\\overline{6}`, and `0.333\\ldots` with a figure three times, as fractions."""
    # two dots mark the first and the last figure that repeat
    text = re.sub(r"\\dot\s*\{?(\d)\}?(\d*)\\dot\s*\{?(\d)\}?", r"\\overline{\1\2\3}", text)
    text = re.sub(
        r"(\d*)\.(\d*)(?:\\(?:overline|bar|dot|overbar)\s*\{?(\d+)\}?|\((\d+)\))",
        lambda m: _fraction(m[1], m[2], m[3] or m[4]),
        text,
    )
    dots = r"(?:\\(?:ldots|dots|cdots)\s*|\.\.\.)"
    return re.sub(rf"(\d*)\.(\d*?)(\d+?)\3\3+{dots}", lambda m: _fraction(m[1], m[2], m[3]), text)


def _fraction(whole: str, fixed: str, repeated: str) -> str:
    denominator = (10 ** len(repeated) - 1) * 10 ** len(fixed)
    top = int((whole or "0") + fixed + repeated) - int((whole or "0") + fixed)
    return rf"\frac{{{top}}}{{{denominator}}}"


def _scientific(text: str) -> str:
    """Rewrite `1.5e3` and `1.5E+3`, as programs print them, as products with a power of ten."""
    return re.sub(
        r"(?<![\w.\\])(\d+(?:\.\d+)?)[eE]([+-]?)0*(\d+)(?![\w.])",
        lambda m: rf"{m[1]}\cdot 10^{{{m[2].strip('+')}{m[3]}}}",
        text,
    )


def _fractions(text: str) -> str:
    """Rewrite fractions, binomials and roots with one command each and braces around arguments."""
    text = re.sub(r"\\(?:[dtc]|nice|s|x|flat)frac(?![a-zA-Z])", r"\\frac", text)
    text = re.sub(r"\^\{?(\d+)\}?\s*/\s*_\{?(\d+)\}?", r"\\frac{\1}{\2}", text)
    text = re.sub(r"\{([^{}]*)\\over\s+([^{}]*)\}", r"\\frac{\1}{\2}", text)
    text = re.sub(r"^([^{}]*)\\over\s+([^{}]*)$", r"\\frac{\1}{\2}", text)
    text = re.sub(r"\\[dt]binom(?![a-zA-Z])", r"\\binom", text)
    text = re.sub(r"\{\s*(\w+)\s*\\choose\s+(\w+)\s*\}", r"\\binom{\1}{\2}", text)
    text = re.sub(r"^(\w+)\s*\\choose\s+(\w+)$", r"\\binom{\1}{\2}", text)
    for command, count in ((r"\frac", 2), (r"\binom", 2), (r"\sqrt", 1)):
        text = _braced(text, command, count)
    # a figure that is a power or an index, and the number after it
    text = re.sub(r"([\^_])(\d)(?=\s+\d)", r"\1{\2}", text)
    return re.sub(r"(?<![\w\\])C\((\d+),\s*(\d+)\)", r"\\binom{\1}{\2}", text)


def _braced(text: str, command: str, count: int) -> str:
    """Put braces around what TeX takes for arguments, as in `\\frac\\pi4` and `\\sqrt2`."""
    place = text.rfind(command)
    while place != -1:
        after = place + len(command)
        if not text[after : after + 1].isalpha():
            option = OPTION.match(text, after)
            head = option[0] if option else ""
            rest = text[after + len(head) :]
            for _ in range(count):
                argument, rest = _argument(rest)
                head += argument
            text = text[:after] + head + rest
        place = text.rfind(command, 0, place)
    return text


def _argument(text: str) -> tuple[str, str]:
    """Return (the first argument in braces, what follows); ("", text) where there is none."""
    text = text.lstrip()
    if text.startswith("{"):
        end = closing(text, 0)
        return (text, "") if end is None else (text[: end + 1], text[end + 1 :])
    match = TOKEN.match(text)
    return (f"{{{match[0]}}}", text[match.end() :]) if match else ("", text)


def _mixed(text: str) -> str:
    """Rewrite mixed numbers: `1 1/2` is one and a half, `1\\frac12` too."""
    text = re.sub(r"(?<![\d.,/^_{])(\d+) (\d+)\s*/\s*(\d+)(?![\d/.])", r"\1\\frac{\2}{\3}", text)
    return re.sub(r"(?<=\d) (?=\\frac\{\d+\}\{\d+\})", "", text)


def _words(text: str) -> str:
    """Rewrite `5\\text{ million}` as five times a power of ten."""
    return re.sub(
        rf"(?<=\d)\s*(\\text\s*\{{\s*)?({'|'.join(POWERS)})\b\s*(\}}?)",
        lambda m: rf"\cdot 10^{{{POWERS[m[2]]}}}" + (m[1] or "" if not m[3] else ""),
        text,
    )


def _double_factorials(text: str) -> str:
    """Compute double factorials: `5!!` is 5 * 3 * 1, no factorial of a factorial."""

    def product(match: re.Match[str]) -> str:
        number = int(match[1])
        if number > MOST_DOUBLE_FACTORIAL:
            return match[0]
        return str(prod(range(number, 0, -2)))

    return re.sub(r"(?<![\d.])(\d{1,6})!!(?!!)", product, text)
