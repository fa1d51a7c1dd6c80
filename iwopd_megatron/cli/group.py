"""The `iwopd` command's own voice: a wrong command line is one sentence like any other mistake."""

from __future__ import annotations

import re
import sys
from typing import Any

import typer
from typer.core import TyperGroup

from iwopd_megatron.errors import RecipeError, UserError

WrongUsage = typer.BadParameter.__bases__[0]  # typer exports no more of its click than this
SETTING = "; a recipe's settings are key=value, e.g. train.lr=3e-4"


class Commands(TyperGroup):
    """All commands, in the order and groups in which they were added."""

    def main(self, *args: Any, standalone_mode: bool = True, **extra: Any) -> Any:
        """Run the command line; exits, as click's own does."""
        extra = {"prog_name": "iwopd", **extra}
        if not standalone_mode:
            return super().main(*args, standalone_mode=False, **extra)
        try:
            code = super().main(*args, standalone_mode=False, **extra)
        except WrongUsage as error:
            if type(error).__name__ == "NoArgsIsHelpError":  # the help is printed
                sys.exit(error.exit_code)
            leave(RecipeError(_sentence(error)))
        except typer.Abort:
            sys.exit(130)
        sys.exit(code if isinstance(code, int) else 0)


def leave(error: UserError) -> None:
    """Say it, and exit with its code."""
    print(f"error: {error}", file=sys.stderr)
    sys.exit(error.exit_code)


def _sentence(error: WrongUsage) -> str:
    """Click's message in the form of all others: what is wrong, and where help is."""
    message = " ".join(error.format_message().split())
    message = re.sub(r" \(Possible options: --help\)", "", message)
    message = re.sub(r"Input should be (a valid )?", "it must be ", message).replace(
        "must be integer", "must be an integer"
    )
    message = re.sub(r", unable to [^;]*", "", message).rstrip(".")
    message = message.replace(". Did you mean", "; did you mean")
    setting = SETTING if message.startswith("No such option") else ""
    joint = "" if message.endswith("?") else ";"
    command = error.ctx.command_path if error.ctx is not None else "iwopd"
    return f"{message[0].lower()}{message[1:]}{setting}{joint} see '{command} --help'."
