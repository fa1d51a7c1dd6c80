"""Lists in answers: their members, and both signs of `\\pm` written out as two members."""

from __future__ import annotations

import re

SEPARATOR = re.compile(r"\s*(?:,|;|\bor\b)\s*")
VARIABLE = re.compile(r"(?:[A-Za-z]|\\[a-z]+)(?:_\{?\w+\}?)?")
OPEN, CLOSE = "([{", ")]}"


def members(text: str) -> list[str]:
    """Return what commas, semicolons and `or` outside all brackets divide: at least one member."""
    found, depth, start, place = [], 0, 0, 0
    while place < len(text):
        depth += (text[place] in OPEN) - (text[place] in CLOSE)
        match = SEPARATOR.match(text, place) if depth == 0 else None
        if match and match.end() > place and not (match[0].strip() == "or" and place == 0):
            found.append(text[start:place])
            place = start = match.end()
        else:
            is_command = text[place] == "\\" and text[place + 1 : place + 2] not in OPEN + CLOSE
            place += 1 + is_command
    return [member.strip() for member in [*found, text[start:]]]


def inside(text: str, opening: str, closing: str) -> str | None:
    """Return what one pair of brackets around the whole text holds; None if none encloses it."""
    text = text.strip()
    if not (text.startswith(opening) and text.endswith(closing) and len(text) > len(opening)):
        return None
    inner, depth = text[len(opening) : -len(closing)], 0
    for character in inner:
        depth += (character in OPEN) - (character in CLOSE)
        if depth < 0:
            return None
    return inner if depth == 0 else None


def named_values(name: str, value: str) -> dict[str, str] | None:
    """Return the values of `x = 1, y = 2` or `(x, y) = (1, 2)` by name.

    None unless there are several names, each once.
    """
    names, values = (members(inside(text, "(", ")") or "") for text in (name, value))
    if len(names) == len(values) > 1 and all(map(VARIABLE.fullmatch, names)):
        pairs = list(zip(names, values, strict=True))
    else:
        pairs = [member.partition("=")[::2] for member in members(value)]
        if not all(VARIABLE.fullmatch(left.strip()) and right for left, right in pairs):
            return None
    named = {left.strip(): right.strip() for left, right in pairs}
    return named if len(named) == len(pairs) > 1 else None


def both_signs(text: str) -> str:
    """Return a list with every member with `\\pm` or `\\mp` twice, its signs taken together."""
    if not re.search(r"\\[pm]m(?![a-zA-Z])|\\mp(?![a-zA-Z])", text):
        return text
    inner = inside(text, r"\{", r"\}")
    if inner is not None:
        return rf"\{{{both_signs(inner)}\}}"
    return ", ".join(one for member in members(text) for one in _two(member))


def _two(member: str) -> list[str]:
    signs = re.findall(r"\\(?:pm|mp)(?![a-zA-Z])", member)
    # two signs in a tuple need not go together
    if not signs or (len(signs) > 1 and len(members(inside(member, "(", ")") or "")) > 1):
        return [member]
    return [_signed(member, "+", "-"), _signed(member, "-", "+")]


def _signed(text: str, plus_minus: str, minus_plus: str) -> str:
    text = re.sub(r"\\pm(?![a-zA-Z])\s*", plus_minus, text)
    text = re.sub(r"\\mp(?![a-zA-Z])\s*", minus_plus, text)
    return re.sub(r"(^|[=(\[{,]\s*)\+", r"\1", text)
