"""What a run writes into its folder beside checkpoints: lines, events, samples, final weights.

Rank 0 writes; that it could not is raised on every rank, so that none waits for another.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Collection, Iterable
from typing import Any

import torch

from iwopd_megatron.config.recipe import Recipe
from iwopd_megatron.errors import DiskError
from iwopd_megatron.records.disk import disk_told
from iwopd_megatron.records.runlog import MetricsLog, append_event, open_log, truncated_shares
from iwopd_megatron.records.samples import keep_samples
from iwopd_megatron.runtime.parallel import Parallel
from iwopd_megatron.weights.hf_writer import save_folder


class Recorder:
    """Of one run. `say` tells who watches. All but `event` and `keep_event` are collective."""

    def __init__(self, recipe: Recipe, parallel: Parallel, say: Callable[[str], None]):
        self.recipe, self.parallel, self.say = recipe, parallel, say
        self._log: MetricsLog | None = None
        self._failure: OSError | DiskError | None = None

    def open(self, resumed_round: int | None) -> list[float]:
        """Begin, or go on after a round; the truncated shares of the rounds that are done."""

        def begin() -> list[float]:
            self._raise_failure()
            self._log = open_log(self.recipe, resumed_round)
            return truncated_shares(self.recipe.out)

        return self.parallel.on_main(begin)

    def write(self, line: dict[str, Any], clock: dict[str, Any]) -> None:
        """One line of the metrics."""

        def append() -> None:
            self._raise_failure()
            self._log.write(line, clock)

        self.parallel.on_main(append)

    def event(self, round_number: int, kind: str, text: str) -> None:
        """Tell who watches, and keep it in events.jsonl."""
        self.say(text)
        self.keep_event(round_number, kind, text)

    def keep_event(self, round_number: int, kind: str, text: str) -> None:
        """Any thread: where it cannot be written, every rank hears with the next line."""
        if self.parallel.is_main:
            try:
                append_event(self.recipe.out, round_number, kind, text)
            except OSError as error:
                self._failure = error

    def samples(self, round_number: int, *kept: Any) -> None:
        """The first of a round's samples, see `keep_samples`."""
        self.parallel.on_main(lambda: keep_samples(self.recipe.out, round_number, *kept))

    def export(self, stream: Iterable[tuple[str, torch.Tensor]], eos_ids: Collection[int]) -> None:
        """Write the final weights as a Hugging Face folder; the last act of a run."""
        tensors, folder = iter(stream), self.recipe.out / "hf"
        if self.parallel.is_main:
            try:
                with disk_told(self.recipe.out):
                    save_folder(folder, tensors, self.recipe.student.hf, eos_ids)
            except DiskError as error:
                self._failure = error
                shutil.rmtree(folder.with_name("hf.partial"), ignore_errors=True)
        for _ in tensors:  # every rank takes part in gathering
            pass
        self.parallel.on_main(self._close)

    def _close(self) -> None:
        self._raise_failure()
        self._log.close()

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure
