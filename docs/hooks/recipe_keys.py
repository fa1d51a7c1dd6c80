"""Tables of a typed YAML file's keys, made from its pydantic models."""

from __future__ import annotations

import inspect
import re
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

# Sections that are described once; a second place refers to the first.
SHOWN_ONCE = ("Source", "Teacher")
WORDS = {str: "text", int: "integer", float: "number", bool: "true, false", Path: "path"}
SIGNS = {"gt": ">", "ge": "≥", "lt": "<", "le": "≤"}


def page(root: type[BaseModel]) -> str:
    """Return Markdown: a heading and a table for every section below `root`."""
    return "\n".join(_sections(root, "", set()))


def keys(root: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Yield the dotted keys of `root`; one of a mapping is NAME, one of a list is [...]."""
    for name, field in root.model_fields.items():
        yield prefix + name
        section, suffix = _section(field.annotation)
        if section is not None:
            yield from keys(section, f"{prefix}{name}{suffix}.")


def _sections(section: type[BaseModel], prefix: str, shown: set[str]) -> Iterator[str]:
    """Return the table of one section, then those of its own sections."""
    title = prefix.removesuffix(".") or "Top level"
    yield f"\n## {f'`{title}`' if prefix else title} {{ #{_anchor(prefix)} }}\n"
    doc = inspect.getdoc(section) if section.__doc__ and "!!" not in section.__doc__ else None
    if doc and section.__mro__[1].__doc__ != section.__doc__:
        yield doc.split("\n\n")[0].replace("\n", " ") + "\n"
    yield "| key | type | default | meaning |\n| --- | --- | --- | --- |"
    inner = []
    for name, field in section.model_fields.items():
        yield _row(prefix + name, field)
        found, suffix = _section(field.annotation)
        if found is not None:
            inner.append((found, f"{prefix}{name}{suffix}."))
    yield ""
    for found, where in inner:
        if found.__name__ in SHOWN_ONCE and found.__name__ in shown:
            first = {"Source": "data.train[...]", "Teacher": "teacher"}[found.__name__]
            title = where.removesuffix(".")
            yield f"\n## `{title}` {{ #{_anchor(where)} }}\n\nThe keys of `{first}`.\n"
            continue
        shown.add(found.__name__)
        yield from _sections(found, where, shown)


def _anchor(prefix: str) -> str:
    """Return the id of a section's heading."""
    return "-".join(["keys", *re.findall(r"\w+", prefix)])


def _row(key: str, field: FieldInfo) -> str:
    section, suffix = _section(field.annotation)
    meaning = field.description or ""
    if section is not None:
        meaning = f"{meaning}; " if meaning else ""
        meaning += f"[its keys](#{_anchor(f'{key}{suffix}.')})"
    cells = [f"`{key}`", _type(field), _default(field, section), meaning]
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _type(field: FieldInfo) -> str:
    """Describe the values that a key takes, with the bounds that are checked."""
    metadata = list(field.metadata)
    text, inside = _kind(field.annotation)
    bounds = [
        f"{SIGNS[name]} {value:g}" if abs(value) < 1e6 else f"{SIGNS[name]} 2^{_power(value)}"
        for part in [*metadata, *inside]
        for name, value in _limits(part)
    ]
    return f"{text}, {', '.join(bounds)}" if bounds else text


def _limits(part: Any) -> Iterator[tuple[str, float]]:
    """Bounds of an annotation's metadata: pydantic's and annotated-types' are named alike."""
    for inner in getattr(part, "metadata", []):
        yield from _limits(inner)
    for name in SIGNS:
        value = getattr(part, name, None)
        if isinstance(value, (int, float)):
            yield name, value


def _power(value: float) -> str:
    power = int(value).bit_length() - 1
    return str(power) if value == 2**power else f"{value:g}"


def _kind(annotation: Any) -> tuple[str, list[Any]]:
    """Name a type in YAML's words, with the metadata of its Annotated parts."""
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        text, inside = _kind(args[0])
        return text, [*inside, *args[1:]]
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in args), []
    if origin in (Union, types.UnionType):
        parts = [_kind(arg) for arg in args if arg is not type(None)]
        names = [text for text, _ in parts] + ["null"] * (type(None) in args)
        return " or ".join(names), [x for _, inside in parts for x in inside]
    if origin is list:
        return f"list of {_kind(args[0])[0]}", []
    if origin is tuple:
        return "list of " + ", ".join(_kind(arg)[0] for arg in args), []
    if origin is dict:
        return f"mapping of name to {_kind(args[1])[0]}", []
    if inspect.isclass(annotation) and issubclass(annotation, BaseModel):
        return "section", []
    return WORDS.get(annotation, "anything"), []


def _section(annotation: Any) -> tuple[type[BaseModel] | None, str]:
    """Find the section that a key holds, and what follows its name: .NAME of a mapping, [...]."""
    if inspect.isclass(annotation) and issubclass(annotation, BaseModel):
        return annotation, ""
    suffix = {list: "[...]", dict: ".NAME"}.get(get_origin(annotation), "")
    for arg in get_args(annotation):
        found, inner = _section(arg)
        if found is not None:
            return found, suffix + inner
    return None, ""


def _default(field: FieldInfo, section: type[BaseModel] | None) -> str:
    if field.is_required():
        return "**required**"
    value = field.get_default(call_default_factory=True)
    if section is not None and isinstance(value, BaseModel):
        return ""
    return f"`{_yaml(value)}`"


def _yaml(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_yaml, value))}]"
    return f"{value:g}" if isinstance(value, float) else '""' if value == "" else str(value)
