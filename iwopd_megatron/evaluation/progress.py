"""The terminal's side of `iwopd eval`: a bar with the time left, a line a benchmark, a table.

Where no bar can be drawn, a line a minute says how far it is.
"""

from __future__ import annotations

import sys
import time
from collections import Counter
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from iwopd_megatron.grading.pool import describe
from iwopd_megatron.records.words import percent, percent_interval

SECONDS_BETWEEN_LINES = 60  # where no bar can be drawn


class BenchProgress:
    """The progress of `iwopd eval` on standard output; usable from any thread."""

    def __init__(self) -> None:
        width = None if sys.stdout.isatty() else 120
        self.console = Console(highlight=False, width=width)
        self.live = self.console.is_terminal
        columns = [TextColumn("{task.description}"), BarColumn(bar_width=20), MofNCompleteColumn()]
        columns += [TextColumn("ETA"), TimeRemainingColumn()]
        self._bar = Progress(*columns, console=self.console, disable=not self.live)
        self._task = self._bar.add_task("", total=None)
        self._name, self._total, self._begun = "", 0, (0.0, 0)
        self._last_line = 0.0

    def __enter__(self) -> BenchProgress:
        self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.stop()

    def say(self, text: str) -> None:
        """Print a line of text above the bar."""
        self.console.print(text, soft_wrap=True)

    def start(self, name: str, total: int, done: int) -> None:
        """Begin to count to `total`; `done` of it were done in an earlier run."""
        self._name, self._total = name, total
        self._begun, self._last_line = (time.monotonic(), done), time.monotonic()
        self._bar.reset(self._task, description=name, total=total, completed=done)

    def advance(self, done: int) -> None:
        """Show that `done` of the total are done."""
        self._bar.update(self._task, completed=done)
        now = time.monotonic()
        if not self.live and now - self._last_line >= SECONDS_BETWEEN_LINES:
            self._last_line = now
            since, before = self._begun
            left = (now - since) / max(done - before, 1) * (self._total - done)
            self.say(f"{self._name} {done}/{self._total}, about {left / 60:.0f} min left")

    def finish(self, name: str, result: dict[str, Any], seconds: float) -> None:
        """Print a benchmark's line; result: as in results.json."""
        count = result["problems"] * result["samples"]
        trouble = describe(Counter(result["grading_trouble"]))
        self.say(f"{name}: {count} answers, {seconds:.1f} s" + (f"; {trouble}" if trouble else ""))

    def table(self, results: dict[str, Any]) -> None:
        """Print a row a benchmark: scores in per cent with 95 % intervals over problems.

        results: by benchmark, as in results.json.
        """
        title = "Right answers in %; in brackets: 95 % bootstrap interval over problems"
        table = Table(title=Text(title))
        for heading in ("benchmark", "problems", "samples", "mean@n", "best@n", "pass@k"):
            table.add_column(heading, justify="left" if heading == "benchmark" else "right")
        for heading in ("truncated (%)", "tokens"):
            table.add_column(heading, justify="right")
        for name, result in results.items():
            has_best = result["samples"] > 1
            inner = [k for k in result["pass_at"] if 1 < int(k) < result["samples"]]
            table.add_row(
                name + (" (greedy)" if result["greedy"] else ""),
                str(result["problems"]),
                str(result["samples"]),
                _with_interval(result["mean"], result["mean_interval"]),
                _with_interval(result["best"], result["best_interval"]) if has_best else "",
                "  ".join(f"@{k} {percent(result['pass_at'][k])}" for k in inner),
                percent(result["truncated"]),
                f"{result['tokens']:.0f}",
            )
        self.console.print(table)


def _with_interval(value: float, bounds: list[float]) -> Text:
    return Text(f"{percent(value)} {percent_interval(bounds)}")
