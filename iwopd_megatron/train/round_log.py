"""What a run tells of its rounds: lines and events to its folder, sentences to who watches."""

from __future__ import annotations

import resource
from collections import Counter
from dataclasses import replace
from typing import Any

from iwopd_megatron.batch.objective import DistillationObjective
from iwopd_megatron.data.run_data import RunData
from iwopd_megatron.grading.pool import describe
from iwopd_megatron.records.recorder import Recorder
from iwopd_megatron.runtime.parallel import gather
from iwopd_megatron.train.progress import Progress
from iwopd_megatron.train.round import Round


class RoundLog:
    """Tells of rounds through a run's recorder and progress.

    `recorded` and `evaluated` are collective, the rest is not.
    """

    def __init__(self, recorder: Recorder, progress: Progress):
        self.recorder, self.progress = recorder, progress

    def loaded_data(self, data: RunData, max_prompt_tokens: int) -> None:
        """Tell which prompts are left out, and what is worth a note in the data."""
        left_out = data.training.too_long
        if left_out:
            self.progress.say(
                f"{left_out} prompts longer than {max_prompt_tokens} tokens are left out."
            )
        for note in data.notes:
            self.progress.say(f"note: {note}")

    def recorded(self, this: Round) -> Round:
        """Write the lines of a round that is over and show it; returns it with its timing."""
        seconds = this.clock.elapsed()
        per_second = this.metrics["response_tokens"] / seconds
        timing: dict[str, Any] = {"tokens_per_second": per_second, "seconds": seconds}
        timing["time"] = this.clock.phases
        timing["peak_rss_gib"] = max(gather(_peak_rss_gib()))
        if this.scored_early is not None:
            timing["scored_early"] = this.scored_early
        self.recorder.write(this.metrics, timing)
        self.progress.round(this.metrics | timing)
        return replace(this, timing=timing)

    def evaluated(
        self,
        this: Round,
        scores: dict[str, Any],
        trouble: Counter[str],
        seconds: float,
        tokenizer: Any,
    ) -> None:
        """Write the line of the evaluation after a round, and some of the round's samples."""
        line = {"kind": "eval", "round": this.number} | scores
        line |= {"grading_trouble": trouble.total()}
        self.grading_trouble(this.number, trouble)
        self.recorder.write(line, {"seconds": seconds})
        self.progress.evaluation(line, this.metrics | this.timing)
        objective = this.minibatches[0].objective if this.minibatches else None
        if isinstance(objective, DistillationObjective):
            self.recorder.samples(
                this.number, this.scored, this.problems, tokenizer, objective.weighting
            )

    def grading_trouble(self, number: int, trouble: Counter[str]) -> None:
        """Tell what was in the way of grading, if anything was."""
        if trouble:
            self.recorder.event(number, "grading", f"round {number}: {describe(trouble)}.")

    def dropped(self, this: Round) -> None:
        """Tell how many answers scoring has kept from the loss, if any."""
        if this.dropped:
            text = f"round {this.number}: {this.dropped} answers are left out."
            self.recorder.event(this.number, "dropped", text)

    def skipped_step(self, number: int, reason: str) -> None:
        """Tell that an optimiser step is left out."""
        text = f"round {number}: {reason}; this optimiser step is left out."
        self.recorder.event(number, "skipped step", text)


def _peak_rss_gib() -> float:
    """Return the most memory that this process has had resident, shared pages included, in GiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux counts in KiB
