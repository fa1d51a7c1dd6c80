"""The `iwopd` command's own voice: a wrong command line is one sentence like any other mistake."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

import typer
from typer.core import TyperGroup

from iwopd_megatron.errors import RecipeError, UserError

SETTING = "; a recipe's settings are key=value, e.g. train.lr=3e-4"


class Commands(TyperGroup):
    """All commands; what is wrong with a command line is said as a recipe's mistakes are."""

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        windows_expand_args: bool = True,
        **extra: Any,
    ) -> Any:
        """Run the command line and exit with its code; without `standalone_mode` return instead."""

        given = (args, prog_name or "iwopd", complete_var, False, windows_expand_args)
        if not standalone_mode:
            return super().main(*given, **extra)
        try:
            code = super().main(*given, **extra)  # which leaves errors to this one
        except typer.TyperException as error:
            if type(error).__name__ == "NoArgsIsHelpError":  # the help is printed
                sys.exit(error.exit_code)
            leave(RecipeError(_sentence(error)))
        except typer.Abort:
            sys.exit(130)
        sys.exit(code if isinstance(code, int) else 0)


def leave(error: UserError) -> NoReturn:
    """Print a user's mistake on stderr, and exit with its code."""
    print(f"error: {error}", file=sys.stderr)
    sys.exit(error.exit_code)


def _sentence(error: typer.TyperException) -> str:
    """Return Typer's message in the form of all others: what is wrong, and where help is."""
    message = " ".join(error.format_message().split())
    message = re.sub(r" \(Possible options: --help\)", "", message)
    message = re.sub(r"Input should be (a valid )?", "it must be ", message).replace(
        "must be integer", "must be an integer"
    )
    message = re.sub(r", unable to [^;]*", "", message).rstrip(".")
    message = message.replace(". Did you mean", "; did you mean")
    setting = SETTING if message.startswith("No such option") else ""
    joint = "" if message.endswith("?") else ";"
    context: typer.Context | None = getattr(error, "ctx", None)  # of an error in usage
    command = "iwopd" if context is None else context.command_path
    return f"{message[0].lower()}{message[1:]}{setting}{joint} see '{command} --help'."
