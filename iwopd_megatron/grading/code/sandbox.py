"""Untrusted programs, run apart: each in a process of its own that sandbox_child.py confines.

Guaranteed on Linux x86-64, as root or not: no network, no new process, no write, rename or deletion
of any file, no signal to another process; memory, processor time, wall time and output are
bounded. Not guaranteed: files that this user may read can be read (nothing leaves but the
output), and an old kernel's bugs are not ours to close. Elsewhere programs are refused, not run.

A program's own failure is a ProgramOutcome or a ProgramError; whatever keeps a program from being
run is a SandboxError.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import secrets
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from iwopd_megatron.errors import UserError
from iwopd_megatron.grading.code.sandbox_filter import NO_SANDBOX
from iwopd_megatron.grading.code.sandbox_values import decode, encode

CHILD = Path(__file__).with_name("sandbox_child.py")
OUTPUT_MB = 16
WALL = 4  # wall seconds a program has for each processor second: no grade depends on the load

MALFORMED = (ValueError, TypeError, KeyError, AttributeError, RecursionError)


class ProgramError(Exception):
    """The program fails, and why; `passed` tests went well before."""

    def __init__(self, reason: str, passed: int = 0):
        """Take the reason in words, and how many tests passed before."""
        super().__init__(reason)
        self.passed = passed


class SandboxError(RuntimeError):
    """The sandbox fails, not the program: nothing is known about the program."""


@dataclass(frozen=True)
class ProgramOutcome:
    """How a program ended: `ok`, `failed` (its exit code is not 0) or `timeout`; its output.

    `reason` says in words why it is not ok, and `passed` how many tests went well.
    """

    status: str
    output: str
    reason: str = ""
    passed: int = 0


@dataclass(frozen=True)
class Sandbox:
    """A runner of programs within limits, in processor seconds; their folder has nothing but them.

    `preamble`: programs find the names that LiveCodeBench and PRIME import in front of them.
    """

    folder: Path
    memory_mb: int = 4096
    preamble: bool = False

    def read_stdin(self, code: str, text: str, seconds: float) -> ProgramOutcome:
        """Run a program on this standard input, as `__main__`."""
        return self._run({"mode": "stdin", "code": code}, text, seconds)

    def call(
        self,
        code: str,
        function: str,
        inputs: list[Any],
        seconds: list[float],
        in_all: float,
        methods: bool = False,
        max_items: int | None = None,
    ) -> list[tuple[Any, float]]:
        """Return (result, seconds) of `function(*input)` for each input; ProgramError if one fails.

        seconds: limit of each input; in_all: of all together; methods: those of a class Solution
        go first; max_items: of a larger result comes a digest.
        """
        job = {
            "mode": "call",
            "code": code,
            "function": function,
            "seconds": seconds,
            "inputs": encode(inputs),
            "methods": methods,
            "max_items": max_items,
        }
        outcome = self._run(job, "", in_all)
        if outcome.status != "ok":
            raise ProgramError(outcome.reason, outcome.passed)
        lines = outcome.output.splitlines()
        if len(lines) != len(inputs):
            raise ProgramError("it ends its process before its tests are done")
        try:
            results = [json.loads(line) for line in lines]
            return [(decode(value), float(taken)) for value, taken in results]
        except (*MALFORMED, ArithmeticError):
            raise ProgramError("it writes among the results of its calls") from None

    def check_asserts(self, code: str, asserts: list[str], seconds: float) -> None:
        """Raise ProgramError unless the assertions hold after the program, which must not exit."""
        token = secrets.token_hex(16)
        job = {"mode": "asserts", "code": code, "asserts": asserts, "token": token}
        outcome = self._run(job, "", seconds)
        if outcome.output != token:
            early = "it ends its process before its tests are done"
            raise ProgramError(outcome.reason or early, outcome.passed)

    def _run(self, job: dict[str, Any], text: str, seconds: float) -> ProgramOutcome:
        program, job_file = self.folder / "answer.py", self.folder / "job.json"
        program.write_text(job["code"], encoding="utf-8", errors="replace", newline="")
        ends = os.pipe()
        reader, writer = os.fdopen(ends[0], "rb", 0), os.fdopen(ends[1], "wb", 0)
        files = [tempfile.TemporaryFile() for _ in range(3)]
        with contextlib.ExitStack() as stack:
            for file in (reader, writer, *files):
                stack.enter_context(file)
            given, written, errors = files
            given.write(text.encode("utf-8", "replace"))
            given.seek(0)
            job |= {
                "memory_mb": self.memory_mb,
                "seconds_in_all": seconds,
                "output_mb": OUTPUT_MB,
                "parent": os.getpid(),
                "file": str(program),
                "started": writer.fileno(),
                "preamble": self.preamble,
            }
            job_file.write_text(json.dumps(job), encoding="utf-8")
            before = _seconds_of_children()
            process = subprocess.Popen(
                [sys.executable, "-I", CHILD, str(job_file)],
                stdin=given,
                stdout=written,
                stderr=errors,
                cwd=self.folder,
                env={"PATH": os.defpath, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
                start_new_session=True,
                pass_fds=(writer.fileno(),),
            )
            writer.close()
            code = _end_of(process, seconds * WALL)
            output, said = (_content(file) for file in (written, errors))
            if reader.read(1) != b"1":
                raise _not_started(code, said)
        if code == -signal.SIGKILL and _seconds_of_children() - before < 0.9 * seconds:
            raise SandboxError("a program was killed from outside; this machine may lack memory.")
        is_late = code in (-signal.SIGXCPU, -signal.SIGKILL)  # SIGKILL: it ignored the former
        status = "ok" if code == 0 else "timeout" if is_late else "failed"
        reason, passed = _explained(code, said, self.memory_mb) if code else ("", 0)
        if is_late:
            reason = f"it exceeds its limit of {seconds:g} processor seconds"
        if code and len(output) >= OUTPUT_MB * 2**20:
            reason = f"it writes more than {OUTPUT_MB} MB"
        return ProgramOutcome(status, output, reason, passed)


def _content(file: Any) -> str:
    file.seek(0)
    return file.read().decode("utf-8", "replace")


def _seconds_of_children() -> float:
    """Return the processor seconds of all processes that this one started and that ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _end_of(process: subprocess.Popen[bytes], seconds: float) -> int:
    """Return a process's exit code; -SIGXCPU if it takes longer than these wall seconds.

    The process and all that it started are gone afterwards.
    """
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        return -signal.SIGXCPU
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _not_started(code: int, said: str) -> Exception:
    """Return the error that says why no program ran.

    UserError where this machine can run none, SandboxError where something went wrong this once.
    """
    if code == NO_SANDBOX:
        return UserError(
            "programs in answers run only under seccomp on Linux x86-64, which this machine "
            "lacks; leave the code problems out."
        )
    last = said.strip().splitlines()[-1:]
    return SandboxError(f"the sandbox did not start: {last[0] if last else f'exit code {code}'}")


def _explained(code: int, said: str, memory_mb: int) -> tuple[str, int]:
    """Return what sandbox_child.py wrote of a failure, in words, and how many tests passed."""
    try:
        failure = json.loads(said)
        kind, text, passed = str(failure["kind"]), str(failure["text"]), int(failure["passed"])
        line = failure.get("line")
    except MALFORMED:  # it crashed, or wrote there itself
        ended = f"crashes ({signal.Signals(-code).name})" if code < 0 else f"ends with code {code}"
        return f"it {ended}", 0
    known = {
        "exit": "it ends itself before its tests are done",
        "slow": "a call takes longer than it may",
        "missing": f"it does not define {text}",
        "MemoryError": f"it needs more than {memory_mb} MB of memory",
    }
    place = f" in line {line}" if line is not None and kind not in known else ""
    return known.get(kind) or f"it raises {text}{place}", passed


@contextlib.contextmanager
def sandbox(memory_mb: int = 4096, preamble: bool = False) -> Iterator[Sandbox]:
    """Make a sandbox in a temporary folder that is removed at the end."""
    with tempfile.TemporaryDirectory(prefix="iwopd-") as folder:
        yield Sandbox(Path(folder), memory_mb, preamble)
