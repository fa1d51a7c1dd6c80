"""What a run writes into its folder beside checkpoints: lines, events, samples, final weights.

Rank 0 writes; that it could not is raised on every rank, so that none waits for another.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Collection, Iterable
from typing import Any

import torch

from iwopd_megatron.batch.trajectory import Trajectory
from iwopd_megatron.config.recipe import Recipe
from iwopd_megatron.data.problems import Problem
from iwopd_megatron.errors import DiskError
from iwopd_megatron.loss.weighting import StepWeighting
from iwopd_megatron.records.disk import disk_told
from iwopd_megatron.records.runlog import MetricsLog, append_event, open_log, truncated_shares
from iwopd_megatron.records.samples import keep_samples
from iwopd_megatron.runtime.parallel import Parallel
from iwopd_megatron.weights.hf_writer import save_folder


class Recorder:
    """Writes the records of one run. All methods but `event` and `keep_event` are collective."""

    def __init__(self, recipe: Recipe, parallel: Parallel, say: Callable[[str], None]):
        """say: shows a sentence to who watches."""
        self.recipe, self.parallel, self.say = recipe, parallel, say
        self._open_log: MetricsLog | None = None  # rank 0's, from `open` on
        self._failure: OSError | DiskError | None = None

    def open(self, resumed_round: int | None) -> list[float]:
        """Begin, or go on after a round; return the truncated shares of the rounds so far."""

        def begin() -> list[float]:
            self._raise_failure()
            self._open_log = open_log(self.recipe, resumed_round)
            return truncated_shares(self.recipe.out)

        return self.parallel.on_main(begin)

    def write(self, line: dict[str, Any], clock: dict[str, Any]) -> None:
        """Write one line of the metrics, and what the clock said of it."""
        self.parallel.on_main(lambda: self._log().write(line, clock))

    def event(self, round_number: int, kind: str, text: str) -> None:
        """Show a sentence to who watches, and keep it in events.jsonl."""
        self.say(text)
        self.keep_event(round_number, kind, text)

    def keep_event(self, round_number: int, kind: str, text: str) -> None:
        """Add to events.jsonl, on rank 0 and from any thread.

        Where that fails, every rank gets the error with the next line.
        """
        if self.parallel.is_main:
            try:
                append_event(self.recipe.out, round_number, kind, text)
            except OSError as error:
                self._failure = error

    def samples(
        self,
        round_number: int,
        samples: list[Trajectory],
        problems: list[Problem],
        tokenizer: Any,
        weighting: StepWeighting,
    ) -> None:
        """Write the first of a round's samples, see `keep_samples`."""
        self.parallel.on_main(
            lambda: keep_samples(
                self.recipe.out, round_number, samples, problems, tokenizer, weighting
            )
        )

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
        self.parallel.on_main(lambda: self._log().close())

    def _log(self) -> MetricsLog:
        """Return rank 0's open log, or raise what an earlier event or export ran into."""
        self._raise_failure()
        if self._open_log is None:
            raise RuntimeError("Recorder.open comes first")
        return self._open_log

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure
