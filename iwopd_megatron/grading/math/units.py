"""Units, percent, degrees and currencies: split from the number they stand beside.

Units are compared only where the reference has one that is known here; they are never converted
(a question that asks for metres is not answered in centimetres). Words that are no unit (`ways`,
`apples`) are dropped. A percentage equals its number and its hundredth, for reference answers are
written either way (`50\\%`, 50 and 0.5); two percentages are compared as they stand. Degrees equal
their number and their radians.
"""

from __future__ import annotations

import re
from typing import NamedTuple

UNITS = {
    "m": "m meter meters metre metres",
    "cm": "cm centimeter centimeters centimetre centimetres",
    "mm": "mm millimeter millimeters millimetre millimetres",
    "dm": "dm decimeter decimeters",
    "km": "km kilometer kilometers kilometre kilometres",
    "in": "in inch inches",
    "ft": "ft foot feet",
    "yd": "yd yard yards",
    "mi": "mi mile miles",
    "g": "g gram grams gramme grammes",
    "kg": "kg kilogram kilograms kilo kilos",
    "mg": "mg milligram milligrams",
    "ton": "ton tons tonne tonnes",
    "lb": "lb lbs pound pounds",
    "oz": "oz ounce ounces",
    "s": "s sec secs second seconds",
    "min": "min mins minute minutes",
    "h": "h hr hrs hour hours",
    "ms": "ms millisecond milliseconds",
    "day": "day days",
    "week": "week weeks",
    "month": "month months",
    "year": "year years yr yrs",
    "L": "l liter liters litre litres",
    "mL": "ml milliliter milliliters",
    "gal": "gal gallon gallons",
    "mi/h": "mph",
    "km/h": "kmh kph kmph",
    "rad": "rad rads radian radians",
    "degree": "deg degree degrees",
    "percent": "percent percentage pct",
    "dollar": "dollar dollars usd",
    "cent": "cent cents",
    "euro": "euro euros eur",
    "yen": "yen",
    "rupee": "rupee rupees rs",
    "K": "kelvin kelvins",
    "degreeC": "celsius",
    "degreeF": "fahrenheit",
    "N": "n newton newtons",
    "J": "j joule joules",
    "W": "w watt watts",
    "V": "v volt volts",
    "A": "ampere amperes amp amps",
    "Hz": "hz hertz",
    "Pa": "pa pascal pascals",
    "mol": "mol mole moles",
    "acre": "acre acres",
    "ha": "ha hectare hectares",
}
CANONICAL = {spelling: unit for unit, group in UNITS.items() for spelling in group.split()}
SIGNS = {r"\$": "dollar", "€": "euro", "£": "pound sterling", "¥": "yen", "₹": "rupee"}
LIST_WORDS = r"(?:and|or|if|for|where|when|with|mod|not|else|otherwise)\b"
POWER = r"(?:\s*\^\s*(?:\{\s*-?\d\s*\}|-?\d))?"
TEXT = rf"\\text\s*\{{(?!\s*{LIST_WORDS})[^{{}}\d\\=<>]*(?:\^\{{?\d\}}?)?\s*\}}{POWER}"
# \text groups at the end, with powers, products and quotients of them
TRAILING = re.compile(rf"(.*[\w)}}\]!%|])\s*((?:{TEXT}(?:\s*(?:[/.]|\\cdot))?\s*)+)", re.DOTALL)
# plain words after a number: a unit, or three letters; one letter beside its number is a symbol
WORD = r"[A-Za-z]+(?:\^\{?\d\}?)?"
PLAIN = re.compile(rf"(.*[\d)}}])\s+(?!{LIST_WORDS})({WORD}(?:[ /]+{WORD})*)[ /]*")
GLUED = re.compile(r"(-?[\d.]+)(cm|mm|dm|km|kg|mg|ml|mL|mph|ft|m|min|hrs?)(\^\{?\d\}?)?")
DEGREES = re.compile(r"(.*?)\s*\^\\circ\s*(?:\\text\s*\{\s*)?([CF])?\s*\}?")
NUMBER = re.compile(r"-?(?:[\d./\s]|\\(?:frac|pi|sqrt)|[{}()])+")
ORDINAL = re.compile(r"(-?\d+)\s*\^?\s*\{?\s*(?:\\text\s*\{)?\s*(?:st|nd|rd|th)\s*\}?\s*\}?")
QUOTIENT = re.compile(
    r"\\frac\s*\{\s*(\\text\s*\{[^{}]*\})\s*\}\s*\{\s*(\\text\s*\{[^{}]*\}[^{}]*(?:\{\d\})?)\s*\}$"
)


class Quantity(NamedTuple):
    """A value's LaTeX and its unit: a name of UNITS, "" without one, "?" for unknown words."""

    value: str
    unit: str


def split_unit(text: str) -> Quantity:
    """Split a normalised answer into its value and the unit at its end or before it (currency)."""
    text = re.sub(r"^\\text\s*\{\s*(-?[\d./,]+)\s+([^{}]*)\}", r"\1 \\text{\2}", text)
    text = re.sub(r"^\\text\s*\{\s*(-?[\d./,]+)\s*\}$", r"\1", text)
    text = re.sub(r"\\text\s*\{\s*(\\\$|[€£¥₹])\s*\}", r"\1", text)
    for sign, unit in SIGNS.items():
        if sign in text:
            return Quantity(split_unit(text.replace(sign, "").strip()).value, unit)
    if match := re.fullmatch(r"(.*?[\w)}])\s*\\?%", text):
        return Quantity(match[1], "percent")
    if match := ORDINAL.fullmatch(text):
        return Quantity(match[1], "")
    match = DEGREES.fullmatch(text)
    if match and NUMBER.fullmatch(match[1]):
        return Quantity(match[1], f"degree{match[2] or ''}")
    text = QUOTIENT.sub(r"\1/\2", text)
    if match := TRAILING.fullmatch(text) or _plain(text):
        return Quantity(match[1], _name("".join(group or "" for group in match.groups()[1:])))
    return Quantity(text, "")


def _plain(text: str) -> re.Match[str] | None:
    """Return (value, words) of words that are a unit or no product of letters; None for others."""
    match = PLAIN.fullmatch(text)
    if match and all(_is_noun(word, match[1]) for word in re.split(r"[ /]+", match[2].strip())):
        return match
    return GLUED.fullmatch(text)


def _is_noun(word: str, value: str) -> bool:
    """Return whether a word names something: letters in alphabetical order are factors instead.

    A single letter is a unit beside a plain number only.
    """
    letters = re.sub(r"\W.*", "", word)
    if len(letters) == 1:
        return letters in "mgshL" and re.fullmatch(r"-?[\d.]+", value) is not None
    is_product = len(letters) < 3 or list(letters) == sorted(letters)
    return letters.lower() in CANONICAL or not is_product


def agree(answer: str, reference: str) -> bool:
    """Return whether the answer's unit is the reference's, as far as both name a known one."""
    if {answer, reference} == {"degree", "rad"}:
        return True  # the values are compared in radians
    if "?" in (answer, reference) or not reference or not answer or answer == reference:
        return True
    return {answer, reference} == {"pound sterling", "lb"}  # both are called pounds


def _name(text: str) -> str:
    """Return the one name of a unit in words, e.g. `m/s^2`; "?" for other words."""
    text = re.sub(r"\\text\s*\{([^{}]*(?:\{\d\})?)\}", r"\1", text).replace(r"\cdot", " ")
    text = re.sub(r"[{}.\s]+", " ", text).replace(" ^", "^").replace("^ ", "^").strip().lower()
    text = re.sub(r"\bper\b", "/", text)
    parts = [_factor(part.strip()) for part in text.split("/")]
    return "/".join(parts) if all(parts) else "?"


def _factor(text: str) -> str:
    """Return one factor's name with its power; "" if it is no unit."""
    power = ""
    for words, figure in (("square|sq|squared", "2"), ("cubic|cu|cubed", "3")):
        if re.search(rf"\b(?:{words})\b", text):
            text, power = re.sub(rf"\s*\b(?:{words})\b\s*", "", text), f"^{figure}"
    if match := re.fullmatch(r"([a-z]+)\s*\^?(\d)", text):
        text, power = match[1], f"^{match[2]}"
    return CANONICAL[text] + power.replace("^1", "") if text in CANONICAL else ""
