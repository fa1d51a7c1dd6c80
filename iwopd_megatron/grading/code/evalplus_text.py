"""The program that EvalPlus's sanitizer makes of a response.

It is the longest part of consecutive lines that parses, by lines that are not blank, and of that
the imports and what the entry point needs, the first of several definitions. Examples, prints,
asserts and `if __name__ == "__main__"` are left out. Kept here though EvalPlus drops them, for
programs that need them are right: decorated definitions, functions without `return`, and
statements that change what is needed (a table filled in a loop, a recursion limit).
"""

from __future__ import annotations

import ast
import builtins
import re
import warnings
from types import CodeType
from typing import Any

from iwopd_megatron.grading.code.program_text import choose, defines, find_blocks, parse, parses

BEGINS = re.compile(r"(import|from|def|class|async|if|try|for|with)\b|@|[A-Za-z_][\w.]*\s*[:=\[(]")
UNFINISHED = ("expected an indented block", "unterminated triple-quoted", "unexpected EOF", "'")
MOST_TRIES = 300  # parts of a long text; each may cost a parse of all that follows
RECURSION = "setrecursionlimit"  # holds for the whole process
BY_NAME = {"globals", "vars", "eval", "exec"}  # reach definitions that nothing names
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
DEFINITIONS = (*FUNCTIONS, ast.ClassDef)
IMPORTS = (ast.Import, ast.ImportFrom)


def longest_program(response: str, function: str) -> str | None:
    """Return the longest part of a response or of its fenced blocks that parses; None without one.

    Blocks that define the function go before others.
    """
    blocks, text = find_blocks(response)
    wanted = frozenset([function])
    texts = choose(blocks, lambda code: defines(code, wanted)) if blocks else [text]
    parts = [text if parses(text) else _longest_part(text) for text in texts]
    parts = [part for part in parts if part.strip()]
    return max(parts, key=_weight) if parts else None


def _weight(text: str) -> int:
    return sum(bool(line.strip()) for line in text.split("\n"))


def _longest_part(text: str) -> str:
    """Return the consecutive lines that parse with the most that are not blank.

    A part begins with a statement.
    """
    lines, first, best, tries = text.split("\n"), 0, "", 0
    while first < len(lines) and tries < MOST_TRIES:
        last = first
        if BEGINS.match(lines[first]) and _may_begin(lines[first]):
            last, tries = _end_of_part(lines, first), tries + 1
        part = "\n".join(lines[first:last])
        if _weight(part) > _weight(best):
            best = part
        first = max(last, first + 1)
    return best


def _may_begin(line: str) -> bool:
    """Return whether a line is no error by itself, other than that it ends too early."""
    try:
        parse(line)
    except SyntaxError as error:
        return error.msg.startswith(UNFINISHED) or line[0] == "@"
    except (ValueError, RecursionError, MemoryError):
        return False
    return True


def _end_of_part(lines: list[str], first: int) -> int:
    """Return the end of the longest part that parses from the line `first` on.

    A part with a syntax error is tried again up to the line of the error.
    """
    last = len(lines)
    while last > first:
        try:
            parse("\n".join(lines[first:last]))
        except SyntaxError as error:
            last = min(last - 1, first + (error.lineno or 1) - 1)
        except (ValueError, RecursionError, MemoryError):
            return first
        else:
            break
    return last


def needed_part(code: str, function: str) -> str:
    """Return a program without the statements that its entry point does not need.

    Lines keep their numbers. A program that does not compile, or does not define the function, is
    returned as it is.
    """
    code = code.replace("\r\n", "\n").replace("\r", "\n")
    try:
        statements = _without_repetitions(parse(code).body)
        uses = [_names_used(statement) for statement in statements]
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return code
    effects = _effects_of_calls(statements)
    changes = [_names_changed(statement, effects) for statement in statements]
    if not any(function in names for names in changes):
        return code
    names = {function, RECURSION}
    kept: set[int] = set()
    if set().union(*uses) & BY_NAME:
        names |= {x.name for x in statements if isinstance(x, DEFINITIONS)}
    while new := {i for i, x in enumerate(changes) if x & names} - kept:
        kept |= new
        names |= set().union(*(uses[i] for i in new))
    needed = [x for i, x in enumerate(statements) if i in kept or isinstance(x, IMPORTS)]
    is_kept = {line for statement in needed for line in _lines(statement)}
    lines = code.split("\n")
    return "\n".join(line if i in is_kept else "" for i, line in enumerate(lines, 1))


def _lines(statement: ast.stmt) -> range:
    decorators = getattr(statement, "decorator_list", [])
    first = min([statement.lineno, *(decorator.lineno for decorator in decorators)])
    return range(first, (statement.end_lineno or statement.lineno) + 1)


def _without_repetitions(statements: list[ast.stmt]) -> list[ast.stmt]:
    """Keep of functions of one name the first that has a return statement, or else the last."""
    named: dict[str, list[ast.stmt]] = {}
    for statement in statements:
        if isinstance(statement, FUNCTIONS):
            named.setdefault(statement.name, []).append(statement)
    chosen = []
    for same in named.values():
        returning = [x for x in same if any(isinstance(y, ast.Return) for y in ast.walk(x))]
        chosen.append(returning[0] if returning else same[-1])
    return [x for x in statements if not isinstance(x, FUNCTIONS) or x in chosen]


def _names_used(statement: ast.stmt) -> set[str]:
    """Return the names in a statement that are not a function's own."""
    module = ast.Module([statement], [])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return _names_in(compile(module, "", "exec", dont_inherit=True))


def _names_in(code: CodeType) -> set[str]:
    inner = [_names_in(part) for part in code.co_consts if isinstance(part, CodeType)]
    return set(code.co_names).union(*inner)


def _effects_of_calls(statements: list[ast.stmt]) -> dict[str, set[str]]:
    """Return the names that calls of a program's functions change; other functions change none."""
    effects: dict[str, set[str]] = {name: set() for name in dir(builtins)}
    for statement in statements:
        if isinstance(statement, DEFINITIONS):
            effects[statement.name] = set()
        elif isinstance(statement, IMPORTS):
            effects |= {name: set() for name in _imported(statement.names)}
    for statement in statements:
        if isinstance(statement, FUNCTIONS):
            nodes = list(ast.walk(statement))
            declared = {x for node in nodes if isinstance(node, ast.Global) for x in node.names}
            own = {x.arg for x in nodes if isinstance(x, ast.arg)}
            own |= {x.name for x in nodes if isinstance(x, DEFINITIONS)} | _imported(nodes)
            own |= {x.id for x in nodes if isinstance(x, ast.Name) and isinstance(x.ctx, ast.Store)}
            effects[statement.name] = declared | (_touched(statement, effects) - own)
    return effects


def _imported(nodes: list[Any]) -> set[str]:
    aliases = [node for node in nodes if isinstance(node, ast.alias)]
    return {(alias.asname or alias.name).partition(".")[0] for alias in aliases}


def _names_changed(statement: ast.stmt, effects: dict[str, set[str]]) -> set[str]:
    """Return the names that a statement defines or assigns, or that its calls may change."""
    if isinstance(statement, DEFINITIONS):
        decorators = [x.func if isinstance(x, ast.Call) else x for x in statement.decorator_list]
        return {statement.name} | {_root(x) for x in decorators if isinstance(x, ast.Attribute)}
    if isinstance(statement, ast.Assert) or _is_main_guard(statement):
        return set()
    return _touched(statement, effects)


def _touched(statement: ast.stmt, effects: dict[str, set[str]]) -> set[str]:
    names = set()
    for node in ast.walk(statement):
        if isinstance(node, DEFINITIONS):
            names.add(node.name)
        elif isinstance(node, ast.alias):
            names |= _imported([node])
        elif isinstance(getattr(node, "ctx", None), (ast.Store, ast.Del)):
            names.add(_root(node))
        elif isinstance(node, ast.Call):
            receiver = [node.func] if isinstance(node.func, ast.Attribute) else []
            names |= {_root(x) for x in [*receiver, *node.args]} - effects.keys()
            called = _called_name(node.func)
            names |= {RECURSION} if called == RECURSION else effects.get(called, set())
    return names - {""}


def _called_name(function: ast.expr) -> str:
    """Return the name of a called function or method; '' where there is none."""
    if isinstance(function, ast.Attribute):
        return function.attr
    return function.id if isinstance(function, ast.Name) else ""


def _is_main_guard(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.If) and "__name__" in {
        node.id for node in ast.walk(statement.test) if isinstance(node, ast.Name)
    }


def _root(node: ast.AST) -> str:
    """Return the name at the start of x.y[z]; '' where there is none."""
    while isinstance(node, (ast.Attribute, ast.Subscript, ast.Starred)):
        node = node.value
    return getattr(node, "id", "")
