"""The `iwopd` command: its groups of commands, and what becomes of their errors.

Importing it imports no torch: commands do so once a recipe has been accepted.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path

import typer

from iwopd_megatron.cli import compare as cli_compare
from iwopd_megatron.cli import convert as cli_convert
from iwopd_megatron.cli import data as cli_data
from iwopd_megatron.cli import doctor as cli_doctor
from iwopd_megatron.cli import eval as cli_eval
from iwopd_megatron.cli import grade as cli_grade
from iwopd_megatron.cli import init as cli_init
from iwopd_megatron.cli import launch as cli_launch
from iwopd_megatron.cli import parity as cli_parity
from iwopd_megatron.cli import plan as cli_plan
from iwopd_megatron.cli import report as cli_report
from iwopd_megatron.cli import serve as cli_serve
from iwopd_megatron.cli import train as cli_train
from iwopd_megatron.cli.group import Commands, leave
from iwopd_megatron.errors import RecipeError, UserError
from iwopd_megatron.records.disk import disk_told

NOT_THERE = (
    errno.ENAMETOOLONG,
    errno.EACCES,
    errno.EPERM,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.ELOOP,
)

COMMANDS: dict[str, dict[str, Callable[..., None]]] = {
    "Train": {
        "train": cli_train.train,
        "compare": cli_compare.compare,
        "sft": cli_train.sft,
        "init": cli_init.init,
        "toy-task": cli_train.toy_task,
        "text-task": cli_train.text_task,
    },
    "Models": {
        "convert": cli_convert.convert,
        "export": cli_convert.export,
        "check": cli_convert.check,
        "prune": cli_convert.prune,
        "parity": cli_parity.parity,
    },
    "Plan and launch": {
        "plan": cli_plan.plan,
        "rehearse": cli_parity.rehearse,
        "launch": cli_launch.launch,
        "status": cli_launch.status,
        "attach": cli_launch.attach,
        "serve-teacher": cli_serve.serve_teacher,
        "serve-rollout": cli_launch.serve_rollout,
    },
    "Look": {
        "report": cli_report.report,
        "eval": cli_eval.evaluate,
        "data": cli_data.data,
        "doctor": cli_doctor.examine,
        "prefixes": cli_report.prefixes,
    },
}
app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="On-policy distillation with discrepancy-weighted tokens on Megatron-Core.",
)
for _group, _commands in COMMANDS.items():
    for _name, _command in _commands.items():
        app.command(_name, rich_help_panel=_group)(_command)
app.add_typer(cli_grade.app, name="grade", rich_help_panel="Look")


def main() -> None:
    """Entry point: a user's mistake is one sentence; a wrong recipe exits with 2."""
    try:
        with disk_told(Path("the output"), is_run=False):
            app()
    except UserError as error:
        leave(error)
    except OSError as error:  # of a path in the recipe or on the command line
        if error.errno not in NOT_THERE or error.filename is None:
            raise
        leave(RecipeError(f"{error.filename} cannot be opened: {error.strerror}; name another."))
