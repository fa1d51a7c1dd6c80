"""Requests between the HTTP thread, which puts, and the Megatron thread, which takes batches."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

from iwopd_megatron.batch.scores import Scores


class QueueFull(Exception):
    """Too many tokens wait; come again."""


class QueueClosed(Exception):
    """The service is ending; nothing more is taken in."""


@dataclass(frozen=True, eq=False)
class Job:
    """One sequence to score: the tokens after `start`."""

    ids: list[int]
    start: int
    topk: int
    temperature: float
    future: Future[Scores] = field(default_factory=Future)

    @property
    def kind(self) -> tuple[int, float]:
        """Jobs of one kind can share a batch."""
        return self.topk, self.temperature


class ScoringQueue:
    """First in, first out, with a bound on the tokens of all jobs not yet answered."""

    def __init__(self, max_tokens: int):
        self.max_tokens = max_tokens
        self.tokens = 0
        self.is_closed = False
        self._jobs: list[Job] = []
        self._changed = threading.Condition()

    def put(self, jobs: Sequence[Job]) -> None:
        """All of them or, raising QueueFull or QueueClosed, none."""
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
            job.future.add_done_callback(lambda _, job=job: self._release(job))

    def take(self, max_tokens: int, wait_s: float, linger_s: float) -> list[Job]:
        """The oldest job and more of its kind, of at most `max_tokens` unless it is one; marked
        as running. [] if none came within `wait_s`; with one, `linger_s` more for others.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: self._jobs, wait_s):
                return []
            end = time.monotonic() + linger_s
            self._changed.wait_for(
                lambda: self._waiting >= max_tokens or self.is_closed,
                max(0.0, end - time.monotonic()),
            )
            batch, rest, total = [], [], 0
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
        return not self._jobs

    @property
    def _waiting(self) -> int:
        return sum(len(job.ids) for job in self._jobs)

    def _release(self, job: Job) -> None:
        with self._changed:
            self.tokens -= len(job.ids)
            if job in self._jobs:  # its client is gone
                self._jobs.remove(job)
