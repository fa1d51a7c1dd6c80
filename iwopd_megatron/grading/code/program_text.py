r"""Which text of a response is its program.

    response                                all other rows                 EvalPlus rows
    drafts in <think>...</think>            never                          never
    several blocks of Python                last that defines what is      longest that defines
                                            called, or that reads input    the entry point
    ... none of which does                  last                           longest
    Python, then output, bash, text, json   the Python                     the Python
    blocks without a language               where no Python is wanted      the same
    blocks of other languages               where there are no others      the same
    no fence                                the whole, if it parses        longest part that parses
    fence never closed                      to the end                     longest part that parses
    examples, prints, asserts after it      run with it                    left out
    helper in one block, use in another     wrong: one block is a program  wrong

PRIME (Eurus) takes the last block fenced with ```python and LiveCodeBench the last block; EvalPlus
takes the longest part that parses, of which it keeps what the entry point needs (evalplus_text.py).
Fences are Markdown's: ``` or ~~~, three or more, closed by as many; Python is py, python3, Python
and the like. More lenient than Markdown, as models write: indented by any width, in a list or a
quotation (the indentation is taken off), behind words of the same line, closed behind code.
"""

from __future__ import annotations

import ast
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field

DRAFT = re.compile(r"<(think|thinking)>.*?(</\1>|\Z)", re.DOTALL | re.IGNORECASE)
END_OF_DRAFT = re.compile(r"</think(ing)?>", re.IGNORECASE)  # it may begin in the prompt
FENCE = re.compile(r"(?P<before>.*?)(?P<fence>(?<!`)`{3,}+|(?<!~)~{3,}+)(?P<info>[^`]*)$")
MARKER = re.compile(r"[\s>]*(?:(?:[-*+]|\d+[.)])\s+)?")  # of a quotation, a list
QUOTED = re.compile(r"\s*>[ \t]?")
PYTHON = re.compile(r"(i|c)?py(thon)?[\d.]*|pypy[\d.]*", re.IGNORECASE)
LANGUAGE = re.compile(r"[\s{.]*([\w+#.-]*)")  # after a fence
READS_INPUT = re.compile(r"\binput\s*[(),]|\bstdin\b|\bopen\(\s*0|\bos\.read\b|\bfileinput\b")


@dataclass
class FencedBlock:
    """A fenced code block of Markdown: its language, '' without one, and its lines."""

    language: str
    fence: str
    indent: int
    is_quoted: bool
    lines: list[str] = field(default_factory=list)

    @property
    def is_python(self) -> bool:
        """Whether its language is a name of Python."""
        return PYTHON.fullmatch(self.language) is not None

    @property
    def text(self) -> str:
        """The code, with the indentation of its first line taken off every line."""
        lines = [QUOTED.sub("", x, count=1) for x in self.lines] if self.is_quoted else self.lines
        first = next((line for line in lines if line.strip()), "")
        margin = first[: len(first) - len(first.lstrip())]
        return "".join(line.removeprefix(margin) + "\n" for line in lines)

    def ends_at(self, line: str) -> bool:
        """Return whether a line is the closing fence; one deep inside the code is not."""
        bare = QUOTED.sub("", line, count=1) if self.is_quoted else line
        is_deep = _indent(bare) >= self.indent + 4
        run = bare.strip()
        return not is_deep and set(run) == {self.fence[0]} and len(run) >= len(self.fence)


def last_program(response: str, is_wanted: Callable[[str], bool]) -> str | None:
    """Return the last program of a response as PRIME does; None without one.

    Blocks that `is_wanted` go before others.
    """
    blocks, text = find_blocks(response)
    if not blocks:
        return text if text.strip() and parses(text) else None
    programs = choose(blocks, is_wanted)
    return programs[-1] if programs else None


def choose(blocks: list[FencedBlock], is_wanted: Callable[[str], bool]) -> list[str]:
    """Return the texts of the blocks that are programs, by the first rule that finds any.

    Blocks of Python that are wanted, wanted ones without a language, all of Python, all without a
    language, and those of other languages that parse as Python, wanted ones first.
    """
    python = [block.text for block in blocks if block.is_python]
    untagged = [block.text for block in blocks if not block.language]
    others = [x.text for x in blocks if x.text.strip() and parses(x.text)]
    return (
        [text for text in python if is_wanted(text)]
        or [text for text in untagged if is_wanted(text) and parses(text)]
        or python
        or untagged
        or [text for text in others if is_wanted(text)]
        or others
    )


def defines(code: str, functions: frozenset[str]) -> bool:
    """Return whether a text seems to define one of these functions or methods."""
    names = "|".join(map(re.escape, functions))
    pattern = rf"^[ \t]*(?:async\s+)?(?:def|class)\s+(?:{names})\b|^(?:{names})\s*="
    return bool(names) and re.search(pattern, code, re.MULTILINE) is not None


def reads_input(code: str) -> bool:
    """Return whether a text seems to read standard input, which an example of its use does not."""
    return READS_INPUT.search(code) is not None


def parse(code: str) -> ast.Module:
    """Return the syntax tree of a text; raise as `ast.parse` does if it is not Python."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of an escape in somebody's string
        return ast.parse(code)


def parses(code: str) -> bool:
    """Return whether a text is Python."""
    try:
        parse(code)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return True


def find_blocks(response: str) -> tuple[list[FencedBlock], str]:
    """Return the fenced blocks of a response, in order, and the response without its drafts."""
    text = DRAFT.sub("", response.replace("\r\n", "\n"))
    text = END_OF_DRAFT.split(text)[-1] if END_OF_DRAFT.search(text) else text
    blocks = _scan(text)
    pages = [block for block in blocks if block.language in ("markdown", "md")]
    return (_scan(pages[-1].text) if pages else []) or blocks, text


def _scan(text: str) -> list[FencedBlock]:
    blocks: list[FencedBlock] = []
    is_open = False
    for line in text.split("\n"):
        opened = _opening(line, blocks[-1] if is_open else None)
        if opened is not None:
            blocks.append(opened)
            is_open = True
        elif is_open:
            is_open = _add(blocks[-1], line)
    return blocks


def _add(block: FencedBlock, line: str) -> bool:
    """Put a line into a block, and return whether the block goes on."""
    if block.ends_at(line):
        return False
    bare = line.rstrip()
    is_behind = block.fence[0] == "`" and bare.endswith(block.fence) and bare.strip(" \t>`")
    if is_behind and bare.count(block.fence) == 1:  # two are code in a comment
        block.lines.append(bare.removesuffix(block.fence))
        return False
    block.lines.append(line)
    return True


def _opening(line: str, inside: FencedBlock | None) -> FencedBlock | None:
    """Return the block that a line opens; None if it opens none.

    Within another block a line opens one only if it names a language and is not deep.
    """
    found = FENCE.match(line)
    if found is None:
        return None
    language = _language(found["info"])
    marker = _marker(found["before"])
    is_first = marker == found["before"]  # on its line
    indent = len(marker) if is_first else _indent(line)
    if not is_first and not (PYTHON.fullmatch(language) and found["fence"][0] == "`"):
        return None
    if inside is not None:
        is_next = language and found["fence"] == inside.fence and indent < inside.indent + 4
        if not is_next or not is_first:
            return None
    return FencedBlock(language, found["fence"], indent, ">" in marker)


def _language(info: str) -> str:
    """Return the first word behind a fence: `python`, `{.python}`, `python:main.py`."""
    found = LANGUAGE.match(info)
    return found[1].lower() if found else ""


def _marker(text: str) -> str:
    """Return the blanks and marks of a quotation or a list at the start of a line."""
    found = MARKER.match(text)
    return found[0] if found else ""


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip())
