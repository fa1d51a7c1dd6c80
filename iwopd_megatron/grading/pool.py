"""Grading processes that may hang or crash: an answer costs its time limit at most, never the run.

An answer whose grading hangs, crashes or raises is wrong, and its grade says what happened.

Workers are started by exec, not fork (this process may hold torch, threads and CUDA), import no
torch, and die with this process.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import time
from collections import Counter, deque
from collections.abc import Iterable
from pathlib import Path
from typing import IO, NamedTuple

from iwopd_megatron.errors import UserError

WALL = 6  # wall seconds an answer has for each processor second: no grade depends on the load
LEAST_WALL = 30.0  # a short limit is no shorter than this by the clock
STARTUP = 60.0  # seconds a new process has for its imports, besides its first answer


class Submission(NamedTuple):
    """A response and its reference answer, to be graded by the grader of that name."""

    grader: str
    response: str
    answer: str


class Grade(NamedTuple):
    """1.0 or 0.0, and what kept the grader from finding out, "" if nothing did."""

    right: float
    trouble: str = ""


def count_trouble(grades: Iterable[Grade]) -> Counter[str]:
    """Count each kind of trouble among grades."""
    return Counter(grade.trouble for grade in grades if grade.trouble)


def describe(trouble: Counter[str]) -> str:
    """Return the counts as a phrase for people, the most frequent first; "" without any."""
    if not trouble:
        return ""
    parts = sorted(trouble.items(), key=lambda item: (-item[1], item[0]))
    return "grading trouble: " + ", ".join(f"{count} {kind}" for kind, count in parts)


def wall(seconds: float) -> float:
    """Return the wall seconds after which a grading of `seconds` of processor time is cut."""
    return max(WALL * seconds, LEAST_WALL)


class GradingWorker:
    """One process, and the place of the submission that it grades; -1 while it is idle."""

    def __init__(self) -> None:
        """Start the process; it imports what a grader needs when it gets its first submission."""
        package = Path(__file__).parents[2]
        paths = [str(package), *filter(None, [os.environ.get("PYTHONPATH")])]
        module = [sys.executable, "-W", "ignore", "-m", f"{__package__}.worker"]
        self.process = subprocess.Popen(
            [*module, str(os.getpid())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"},
            start_new_session=True,
        )
        self._requests, self.grades = _pipe(self.process.stdin), _pipe(self.process.stdout)
        self.place, self.deadline = -1, float("inf")
        self.received, self.patience = b"", STARTUP

    def give(self, place: int, submission: Submission, seconds: float) -> None:
        """Send a submission and set its deadline: `seconds` of processor time as wall time."""
        self.place, self.received = place, b""
        self.deadline = time.monotonic() + wall(seconds) + self.patience
        self.patience = 0.0
        request = submission._asdict() | {"seconds": seconds}
        with contextlib.suppress(BrokenPipeError):  # it crashed: its end is read next
            self._requests.write(json.dumps(request).encode() + b"\n")
            self._requests.flush()

    def last_words(self, seconds: float) -> str:
        """Return why a process whose output ended has ended; `seconds` was its limit."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(STARTUP)
        if self.process.returncode == -signal.SIGPROF:
            return f"cut at {seconds:g} s"
        return "crashed"

    def become_idle(self) -> None:
        """Forget the submission and its deadline."""
        self.place, self.deadline = -1, float("inf")

    def stop(self) -> None:
        """Kill the process and all that it started, and close its pipes."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        for pipe in (self._requests, self.grades):
            with contextlib.suppress(BrokenPipeError):
                pipe.close()


def _pipe(pipe: IO[bytes] | None) -> IO[bytes]:
    """Return a pipe of a process that was started with pipes."""
    if pipe is None:
        raise ValueError("the process was started without this pipe")
    return pipe


class GradingPool:
    """At most `workers` grading processes, started when first needed."""

    def __init__(self, workers: int, seconds: float):
        """Take the limits; `seconds` of processor time is what grading one submission may take."""
        self.count, self.seconds = workers, seconds
        self.workers: list[GradingWorker] = []

    def grade(self, submissions: list[Submission]) -> list[Grade]:
        """Grade submissions, in order; one whose grading hangs, crashes or raises is wrong."""
        waiting, grades = deque(enumerate(submissions)), [Grade(0.0)] * len(submissions)
        busy = selectors.DefaultSelector()
        try:
            while waiting or busy.get_map():
                while waiting and len(busy.get_map()) < self.count:
                    worker = self._idle_worker()
                    worker.give(*waiting.popleft(), self.seconds)
                    busy.register(worker.grades, selectors.EVENT_READ, worker)
                at_work = [key.data for key in busy.get_map().values()]
                patience = min(worker.deadline for worker in at_work) - time.monotonic()
                for key, _ in busy.select(max(patience, 0)):
                    self._read(key.data, busy, grades)
                for worker in at_work:  # one that has answered has no deadline any more
                    if worker.deadline <= time.monotonic():
                        grades[worker.place] = Grade(
                            0.0, f"cut after {wall(self.seconds):g} s of waiting"
                        )
                        self._drop(worker, busy)
        except BaseException:
            self.close()
            raise
        finally:
            busy.close()
        return grades

    def _idle_worker(self) -> GradingWorker:
        """Return an idle worker, a new one where all are busy."""
        for worker in self.workers:
            if worker.place == -1:
                return worker
        self.workers.append(GradingWorker())
        return self.workers[-1]

    def _read(
        self, worker: GradingWorker, busy: selectors.BaseSelector, grades: list[Grade]
    ) -> None:
        """Read what a worker has written, and its grade if that is complete."""
        piece = os.read(worker.grades.fileno(), 65536)
        worker.received += piece
        if not piece:
            grades[worker.place] = Grade(0.0, worker.last_words(self.seconds))
            self._drop(worker, busy)
        elif worker.received.endswith(b"\n"):
            result = json.loads(worker.received)
            if "error" in result:
                raise UserError(result["error"])
            grades[worker.place] = Grade(float(result["right"]), result.get("trouble", ""))
            busy.unregister(worker.grades)
            worker.become_idle()

    def _drop(self, worker: GradingWorker, busy: selectors.BaseSelector) -> None:
        """End a worker; the next submission gets a new process."""
        busy.unregister(worker.grades)
        worker.become_idle()
        worker.stop()
        self.workers.remove(worker)

    def close(self) -> None:
        """End all worker processes; the pool may be used again."""
        while self.workers:
            self.workers.pop().stop()
