"""Which box of a response holds the answer.

The last complete one counts: `\\boxed{...}`, `\\fbox{...}` or `\\framebox{...}`, blanks before
the brace allowed, and `\\boxed 7` without braces. Boxes side by side at the end, with no more than
`and`, `or`, commas and `x =` between them, are a list, for references that are lists.
"""

from __future__ import annotations

import re

BOXED = "\\boxed{"
COMMAND = re.compile(r"\\(?:boxed|fbox|framebox)(?![a-zA-Z])\s*")
# what a box without braces holds: a number, a command with its arguments, or one letter
BARE = re.compile(r"-?\d+(?:[.,/]\d+)*|\\[a-zA-Z]+(?:\{[^{}]*\})*|[a-zA-Z](?![a-zA-Z])")
SEPARATOR = re.compile(r",|;|\band\b|\bor\b|\\q?quad")
BETWEEN = re.compile(
    r"(?:[\s$,;~&]|\\[,;:!() \[\]]|\band\b|\bor\b|\\text\s*\{\s*(?:and|or|,)\s*\}|\\q?quad"
    r"|[a-zA-Z](?:_\{?\w+\}?)?\s*=)*"
)


def last_boxed(text: str) -> str | None:
    """Return what stands in the last complete box, nested braces and all; None without one."""
    boxes = _boxes(text, most=1)
    return boxes[0][2] if boxes else None


def last_boxes(text: str) -> list[str]:
    """Return the contents of the boxes side by side at the end of a text, in their order."""
    found = _boxes(text, most=12)
    run = found[:1]
    for box in found[1:]:
        between = text[box[1] : run[-1][0]]
        if not (BETWEEN.fullmatch(between) and SEPARATOR.search(between)):
            break
        run.append(box)
    return [content for _, _, content in reversed(run)]


def _boxes(text: str, most: int) -> list[tuple[int, int, str]]:
    """Return (start, end, content) of at most `most` complete boxes, the last one first."""
    found: list[tuple[int, int, str]] = []
    for match in reversed(list(COMMAND.finditer(text))):
        box = _content(text, match.end())
        if box is not None:
            found.append((match.start(), *box))
        if len(found) == most:
            break
    return found


def _content(text: str, start: int) -> tuple[int, str] | None:
    """Return (end, content) of the box that opens at `start`; None if it is not complete."""
    if text[start : start + 1] != "{":
        bare = BARE.match(text, start)
        return (bare.end(), bare.group()) if bare else None
    end = closing(text, start)
    return None if end is None else (end + 1, text[start + 1 : end])


def closing(text: str, start: int) -> int | None:
    """Return the place of the brace that closes the one at `start`; None without one.

    `\\{` and `\\}` are no grouping.
    """
    depth, place = 0, start
    while place < len(text):
        if text[place] == "\\":
            place += 1
        else:
            depth += (text[place] == "{") - (text[place] == "}")
        if depth == 0:
            return place
        place += 1
    return None
