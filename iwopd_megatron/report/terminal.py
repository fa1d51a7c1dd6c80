"""What `iwopd compare` and `iwopd report` print of runs: findings, and the table of arms."""

from __future__ import annotations

import sys
from typing import Any, TextIO

from rich.console import Console
from rich.table import Table
from rich.text import Text

from iwopd_megatron.report.arms import arm_table
from iwopd_megatron.report.finding import findings


def print_table(summary: dict[str, Any], file: TextIO | None = None) -> None:
    """Print the findings and the table of arms, as the page has them.

    summary: of `summary.summarise`; file: default stdout.
    """
    shown = arm_table(summary)
    stream = file or sys.stdout
    console = Console(file=stream, width=None if stream.isatty() else 140, highlight=False)
    table = Table()
    for number, heading in enumerate(shown.headings):
        table.add_column(Text(heading), justify="right" if number else "left", overflow="fold")
    for row in shown.rows:
        table.add_row(*(Text("\n".join(filter(None, cell))) for cell in row))
    for sentence in findings(summary):
        console.print(Text(sentence))
    console.print(table)
    console.print(Text(shown.note))
