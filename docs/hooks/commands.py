"""A page of every `iwopd` command, made from typer's own description of it."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

from typer.main import get_command

GROUPLESS = "Other"


def page() -> str:
    """Return Markdown: commands under the headings of `iwopd --help`, in its order."""
    return "\n".join(_lines(all_commands()))


def all_commands() -> dict[str, Any]:
    """Return every command by what is typed after `iwopd`."""
    from iwopd_megatron.cli.main import app

    found = {}
    for name, command in get_command(app).commands.items():
        if hasattr(command, "commands"):
            for inner, part in command.commands.items():
                part.rich_help_panel = getattr(command, "rich_help_panel", None)
                found[f"{name} {inner}"] = part
        else:
            found[name] = command
    return found


def options(command: Any) -> list[str]:
    """Return what may follow a command: its options' names, with both dashes."""
    return [name for param in command.params for name in [*param.opts, *param.secondary_opts]]


def _lines(commands: dict[str, Any]) -> Iterator[str]:
    groups: dict[str, list[str]] = {}
    for name, command in commands.items():
        group = getattr(command, "rich_help_panel", None)
        groups.setdefault(group if isinstance(group, str) else GROUPLESS, []).append(name)
    for group, names in groups.items():
        yield f"\n## {group}\n"
        for name in names:
            yield from _command(name, commands[name])


def _command(name: str, command: Any) -> Iterator[str]:
    arguments = [param for param in command.params if param.param_type_name == "argument"]
    words = " ".join(_word(param) for param in arguments)
    has_options = len(command.params) > len(arguments)
    yield f"\n### `iwopd {name}`\n"
    yield f"```text\niwopd {name} {words}{' [OPTIONS]' * has_options}\n```\n"
    yield inspect.cleandoc(command.help or "") + "\n"
    yield "| | type | default | meaning |\n| --- | --- | --- | --- |"
    for param in command.params:
        if param.name not in ("help",) and not getattr(param, "hidden", False):
            yield _row(param)
    yield ""


def _word(param: Any) -> str:
    name = (param.metavar or param.name).upper()
    name += "..." * (param.nargs == -1)
    return name if param.required else f"[{name}]"


def _row(param: Any) -> str:
    is_argument = param.param_type_name == "argument"
    shown = [_word(param).strip("[]")] if is_argument else [*param.opts, *param.secondary_opts]
    default = "**required**" if param.required else _default(param.default)
    cells = [", ".join(f"`{name}`" for name in shown), _type(param), default, param.help or ""]
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _type(param: Any) -> str:
    annotation = param.type_descriptor.annotation
    name = getattr(annotation, "__name__", str(annotation))
    if name == "list":
        return "several"
    words = {"Path": "path", "str": "text", "int": "integer", "float": "number", "bool": "switch"}
    text = words.get(name, name)
    limits = [f"≥ {param.min}"] if param.min is not None else []
    limits += [f"≤ {param.max}"] if param.max is not None else []
    return ", ".join([text, *limits])


def _default(value: Any) -> str:
    if value is None or value is False or value == "":
        return ""
    return f"`{value}`"
