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
from typing import Any, NamedTuple

from iwopd_megatron.errors import UserError

WALL = 6  # wall seconds an answer has for each processor second: no grade depends on the load
LEAST_WALL = 30.0  # a short limit is no shorter than this by the clock
STARTUP = 60.0  # seconds a new process has for its imports, besides its first answer


class Answer(NamedTuple):
    """What is to be graded, and by which grader."""

    grader: str
    response: str
    answer: str


class Grade(NamedTuple):
    """1.0 or 0.0, and what went wrong while it was found, "" if nothing did."""

    right: float
    trouble: str = ""


def count_trouble(grades: Iterable[Grade]) -> Counter[str]:
    """How often each kind of trouble was met."""
    return Counter(grade.trouble for grade in grades if grade.trouble)


def describe(trouble: Counter[str]) -> str:
    """The counts as a phrase for people, the most frequent first; "" without any."""
    if not trouble:
        return ""
    parts = sorted(trouble.items(), key=lambda item: (-item[1], item[0]))
    return "grading trouble: " + ", ".join(f"{count} {kind}" for kind, count in parts)


def wall(seconds: float) -> float:
    """The wall seconds after which an answer is cut that may use `seconds` of processor time."""
    return max(WALL * seconds, LEAST_WALL)


class Worker:
    """One process and the answer it is busy with."""

    def __init__(self) -> None:
        package = Path(__file__).parents[2]
        paths = [str(package), *filter(None, [os.environ.get("PYTHONPATH")])]
        module = [sys.executable, "-W", "ignore", "-m", f"{__package__}.worker"]
        self.process = subprocess.Popen(
            [*module, str(os.getpid())],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"},
            start_new_session=True,
        )  # fmt: skip
        self.place, self.deadline = -1, float("inf")
        self.received, self.patience = b"", STARTUP

    def give(self, place: int, answer: Answer, seconds: float) -> None:
        self.place, self.received = place, b""
        self.deadline = time.monotonic() + wall(seconds) + self.patience
        self.patience = 0.0
        request = answer._asdict() | {"seconds": seconds}
        with contextlib.suppress(BrokenPipeError):  # it crashed: its end is read next
            self.process.stdin.write(json.dumps(request).encode() + b"\n")
            self.process.stdin.flush()

    def last_words(self, seconds: float) -> str:
        """Why a worker whose output ended has ended."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(STARTUP)
        if self.process.returncode == -signal.SIGPROF:
            return f"cut at {seconds:g} s"
        return "crashed"

    def stop(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            with contextlib.suppress(BrokenPipeError):
                pipe.close()


class Pool:
    """`workers` processes, started when first needed; `seconds` of processor time an answer has."""

    def __init__(self, workers: int, seconds: float):
        self.count, self.seconds = workers, seconds
        self.workers: list[Worker] = []

    def grade(self, answers: list[Answer]) -> list[Grade]:
        """A grade each, in order; an answer whose grading hangs or crashes is wrong."""
        waiting, grades = deque(enumerate(answers)), [Grade(0.0)] * len(answers)
        busy = selectors.DefaultSelector()
        try:
            while waiting or busy.get_map():
                while waiting and len(busy.get_map()) < self.count:
                    worker = self._idle_worker()
                    worker.give(*waiting.popleft(), self.seconds)
                    busy.register(worker.process.stdout, selectors.EVENT_READ, worker)
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

    def _idle_worker(self) -> Worker:
        for worker in self.workers:
            if worker.place == -1:
                return worker
        self.workers.append(Worker())
        return self.workers[-1]

    def _read(self, worker: Worker, busy: Any, grades: list[Grade]) -> None:
        piece = os.read(worker.process.stdout.fileno(), 65536)
        worker.received += piece
        if not piece:
            grades[worker.place] = Grade(0.0, worker.last_words(self.seconds))
            self._drop(worker, busy)
        elif worker.received.endswith(b"\n"):
            result = json.loads(worker.received)
            if "error" in result:
                raise UserError(result["error"])
            grades[worker.place] = Grade(float(result["right"]), result.get("trouble", ""))
            busy.unregister(worker.process.stdout)
            worker.place, worker.deadline = -1, float("inf")

    def _drop(self, worker: Worker, busy: Any) -> None:
        """End a worker; the next answer gets a new process."""
        busy.unregister(worker.process.stdout)
        worker.place, worker.deadline = -1, float("inf")
        worker.stop()
        self.workers.remove(worker)

    def close(self) -> None:
        """End all workers; the pool may be used again."""
        while self.workers:
            self.workers.pop().stop()
