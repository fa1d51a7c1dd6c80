"""`iwopd report`: what runs recorded, as one page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from iwopd_megatron.errors import RecipeError


def report(
    folders: Annotated[list[Path], typer.Argument(help="run folders, or folders of compared runs")],
    out: Annotated[
        Path | None,
        typer.Option(help="folder of report.html; default: the only one, else runs/report"),
    ] = None,
) -> None:
    """Draw report.html of runs or comparisons, several in one page."""
    from iwopd_megatron.report import write_report

    for folder in folders:
        if not folder.is_dir():
            raise RecipeError(f"{folder} is no folder; give a run folder, a recipe's 'out'.")
    print(write_report(folders, out or (folders[0] if len(folders) == 1 else Path("runs/report"))))
