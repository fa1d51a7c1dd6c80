"""What a person who watches a run sees: a live line in a terminal, else a line an evaluation."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

from iwopd_megatron.records.words import percent

if TYPE_CHECKING:
    from iwopd_megatron.weights.hf_reader import Loaded


class Progress:
    """Console output of rank 0; other ranks construct it with `visible=False` and print nothing."""

    def __init__(self, total_rounds: int, visible: bool):
        """total_rounds: of all runs that it will show, one after the other."""
        self.console = Console(quiet=not visible, highlight=False)
        self.live = self.console.is_terminal and visible
        self._bar = RichProgress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            TextColumn("ETA"),
            TimeRemainingColumn(),
            console=self.console,
            disable=not self.live,
        )
        self._task = self._bar.add_task("", total=total_rounds, figures="")
        self._name, self._accuracy = "", float("nan")
        self._roles: set[str] = set()

    def __enter__(self) -> Progress:
        self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.stop()

    def start(self, name: str, skipped_rounds: int = 0) -> None:
        """Show that a run begins; rounds finished earlier count as done."""
        self._name, self._accuracy = name, float("nan")
        self._bar.update(self._task, description=name, advance=skipped_rounds)

    def round(self, line: dict[str, Any]) -> None:
        """Show that a round ended. line: its metrics and timing."""
        self._bar.update(self._task, advance=1, figures=self._figures(line))

    def evaluation(self, line: dict[str, Any], last_round: dict[str, Any]) -> None:
        """Show that an evaluation ended. last_round: the line of the round before it, or {}."""
        self._accuracy = line["accuracy"]
        if not self.live:
            self.console.print(
                f"{self._name}  round {line['round']:>4}  {self._figures(last_round)}",
                soft_wrap=True,
            )

    def say(self, text: str) -> None:
        """Print a sentence above the live line."""
        self.console.print(text, soft_wrap=True)

    def loaded(self, role: str, ranks: list[Loaded]) -> None:
        """Print how much each rank read of a model; once a role, for further runs repeat it."""
        if role in self._roles:
            return
        self._roles.add(role)
        sizes, seconds = ([x[i] for x in ranks] for i in (0, 1))
        self.say(
            f"{role}: {min(sizes) / 1e6:,.1f} to {max(sizes) / 1e6:,.1f} MB read a rank "
            f"({sum(sizes) / 1e6:,.1f} MB in all), in {min(seconds):.2f} to {max(seconds):.2f} s"
        )

    def _figures(self, line: dict[str, Any]) -> str:
        known = self._accuracy == self._accuracy
        parts = [f"accuracy {percent(self._accuracy)} %"] if known else []
        formats = {
            "loss": "loss {:+.4f}",
            "abs_gap": "gap {:.3f}",
            "tokens_per_second": "{:,.0f} tok/s",
        }
        return "  ".join(
            parts + [text.format(line[key]) for key, text in formats.items() if key in line]
        )
