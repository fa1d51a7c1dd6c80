"""What is wrong with a tree of settings, in one sentence: which key, its value, what to write."""

from __future__ import annotations

import difflib
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError

# What belongs there, by the beginning of pydantic's name of the error.
WANTED = {
    "int": "an integer",
    "float": "a number",
    "finite_number": "a finite number",
    "bool": "true or false",
    "string": "text; quote what is not",
    "path": "a path",
    "list": "a list, e.g. [a, b]",
    "tuple": "a list, e.g. [a, b]",
    "greater_than_equal": "a number greater than or equal to {ge}",
    "greater_than": "a number greater than {gt}",
    "less_than_equal": "a number less than or equal to {le}",
    "less_than": "a number less than {lt}",
    "literal_error": "one of {expected}",
    "too_short": "a list of {min_length} or more",
    "too_long": "a list of {max_length} or fewer",
    "recursion_loop": "what does not hold itself",
}
LONGEST = 60  # characters of a value that are shown


def explain(invalid: ValidationError, root: type[BaseModel], is_recipe: bool = True) -> str:
    """Return a sentence on the first problem of a tree that is no `root`.

    is_recipe: its keys can be given on the command line too, which the sentence then says.
    """
    error = invalid.errors()[0]
    parts, annotation = _place(root, error["loc"])
    key, kind = ".".join(parts), error["type"]
    if kind == "extra_forbidden":
        return _unknown(key, str(error["loc"][-1]), _section(annotation) or root)
    if kind == "missing" and not isinstance(error["loc"][-1], int):
        where = f" to the recipe or write {key}=... on the command line" if is_recipe else ""
        return f"'{key}' is missing; add it{where}."
    if kind == "missing":  # of a list of fixed length
        return f"'{'.'.join(parts[:-1])}' is too short; write all its values, e.g. [a, b]."
    if kind == "value_error":
        return f"'{key}' is {shown(error['input'])}: {error['ctx']['error']}."
    return f"'{key}' is {shown(error['input'])}; write {_wanted(error, key, annotation)}."


def _unknown(section_key: str, name: str, section: type[BaseModel]) -> str:
    key = f"{section_key}.{name}" if section_key else name
    close = difflib.get_close_matches(name, section.model_fields, 1)
    if close:
        return f"unknown key '{key}'; did you mean '{close[0]}'?"
    return f"unknown key '{key}'; known keys: {', '.join(section.model_fields)}."


def _wanted(error: Any, key: str, annotation: Any) -> str:
    section = _section(annotation)
    if section is not None:
        fields = section.model_fields
        first = next((name for name in fields if fields[name].is_required()), next(iter(fields)))
        by_key = f", or {key}.{first}=... for one of its keys" * (not key[-1].isdigit())
        return f"a section of 'key: value' lines{by_key}"
    if error["type"].startswith(("dict", "mapping")):
        return f"a section of 'key: value' lines, or {key}.NAME=..."
    for beginning, words in WANTED.items():
        if error["type"].startswith(beginning):
            return words.format(**error.get("ctx", {}))
    return f"another value ({error['msg'][0].lower()}{error['msg'][1:]})"


def shown(value: Any) -> str:
    """Return a value as a recipe spells it, shortened to LONGEST characters."""
    if value is None or value == "":
        return "empty"
    if isinstance(value, bool):
        return str(value).lower()
    if value == []:
        return "an empty list"
    if isinstance(value, dict | list):
        return "a section" if isinstance(value, dict) else "a list"
    text = repr(value)
    return text if len(text) <= LONGEST else text[: LONGEST - 3] + "..."


def _place(root: type[BaseModel], path: tuple[str | int, ...]) -> tuple[list[str], Any]:
    """Return the keys of an error's path that exist in `root`, and the type of what stands there.

    Pydantic's paths have more: the members of a union, and the key that is unknown.
    """
    parts, annotation = [], root
    for part in path:
        inner = _inner(annotation, part)
        if inner is None:
            break
        parts.append(str(part))
        annotation = inner
    return parts, annotation


def _inner(annotation: Any, part: str | int) -> Any:
    """Return the type of a part of a type; None if it has no such part."""
    for option in _options(annotation):
        if get_origin(option) in (dict, list, tuple):
            return get_args(option)[-1]
    section = _section(annotation)
    field = section.model_fields.get(str(part)) if section is not None else None
    return None if field is None else field.annotation


def _section(annotation: Any) -> type[BaseModel] | None:
    sections = [o for o in _options(annotation) if isinstance(o, type) and issubclass(o, BaseModel)]
    return sections[0] if sections else None


def _options(annotation: Any) -> tuple[Any, ...]:
    if get_origin(annotation) is Annotated:
        annotation = get_args(annotation)[0]
    return get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)
