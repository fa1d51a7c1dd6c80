"""The queue of a scoring server: its HTTP thread puts jobs, its Megatron thread takes batches."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial

from iwopd_megatron.batch.scores import Scores


class QueueFull(Exception):
    """Too many tokens wait; the client may come again."""


class QueueClosed(Exception):
    """The service is ending; nothing more is taken in."""


@dataclass(frozen=True, eq=False)
class ScoringJob:
    """One sequence to score: log-probs of the tokens after `start`, at the temperature."""

    ids: list[int]
    start: int
    topk: int
    temperature: float
    future: Future[Scores] = field(default_factory=Future)

    @property
    def kind(self) -> tuple[int, float]:
        """What jobs must have in common to share a batch."""
        return self.topk, self.temperature


class ScoringQueue:
    """First in, first out, with a bound on the tokens of all jobs not yet answered.

    Usable from any thread.
    """

    def __init__(self, max_tokens: int):
        self.max_tokens = max_tokens
        self.tokens = 0
        self.is_closed = False
        self._jobs: list[ScoringJob] = []
        self._changed = threading.Condition()

    def put(self, jobs: Sequence[ScoringJob]) -> None:
        """Take all of these in or, raising QueueFull or QueueClosed, none."""
        tokens = sum(len(job.ids) for job in jobs)
        with self._changed:
            if self.is_closed:
                raise QueueClosed
            if self.tokens + tokens > self.max_tokens:
                raise QueueFull
            self.tokens += tokens
            self._jobs += jobs
            self._changed.notify()
        for job in jobs:
            job.future.add_done_callback(partial(self._release, job))

    def take(self, max_tokens: int, wait_s: float, linger_s: float) -> list[ScoringJob]:
        """Return the oldest job and more of its kind, marked as running.

        They have at most `max_tokens`, unless it is one job. Waits `wait_s` seconds for the first,
        [] if none came, and then `linger_s` for others.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: bool(self._jobs), wait_s):
                return []
            end = time.monotonic() + linger_s
            self._changed.wait_for(
                lambda: self._waiting >= max_tokens or self.is_closed,
                max(0.0, end - time.monotonic()),
            )
            batch: list[ScoringJob] = []
            rest: list[ScoringJob] = []
            total = 0
            for job in self._jobs:
                fits = not batch or total + len(job.ids) <= max_tokens
                if fits and (not batch or job.kind == batch[0].kind):
                    batch.append(job)
                    total += len(job.ids)
                else:
                    rest.append(job)
            self._jobs = rest
        return [job for job in batch if job.future.set_running_or_notify_cancel()]

    def close(self) -> None:
        """Take nothing more in; what is in can still be taken out."""
        with self._changed:
            self.is_closed = True
            self._changed.notify()

    @property
    def is_empty(self) -> bool:
        """Whether no job waits to be taken."""
        return not self._jobs

    @property
    def _waiting(self) -> int:
        return sum(len(job.ids) for job in self._jobs)

    def _release(self, job: ScoringJob, future: Future[Scores]) -> None:
        with self._changed:
            self.tokens -= len(job.ids)
            if job in self._jobs:  # its client is gone
                self._jobs.remove(job)
