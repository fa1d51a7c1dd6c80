"""Untrusted programs, run apart: each in a process of its own that sandbox_child.py confines.

Guaranteed on Linux x86-64, as root or not: no network, no new process, no write, rename or deletion
of any file, no signal to another process; memory, processor time, wall time and output are
bounded. Not guaranteed: files that this user may read can be read (nothing leaves but the
output), and an old kernel's bugs are not ours to close. Elsewhere programs are refused, not run.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from iwopd_megatron import sandbox_child
from iwopd_megatron.errors import UserError

OUTPUT_MB = 16
WALL = 4  # wall seconds a program has for each processor second: no grade depends on the load


@dataclass(frozen=True)
class Outcome:
    """How a program ended: `ok`, `failed` (its exit code is not 0) or `timeout`; its output."""

    status: str
    output: str


@dataclass(frozen=True)
class Sandbox:
    """Runs programs within limits, in processor seconds; their folder has nothing but the job."""

    folder: Path
    memory_mb: int = 4096

    def read_stdin(self, code: str, text: str, seconds: float) -> Outcome:
        """Run a program on this standard input."""
        return self._run({"mode": "stdin", "code": code}, text, seconds)

    def call(
        self, code: str, function: str, inputs: list[Any], seconds: list[float], in_all: float
    ) -> list[tuple[Any, float]] | None:
        """[(result, seconds)] of `function(*input)` for every input; None if any fails.

        seconds: limit of each input; in_all: of all together. Methods of a class Solution count.
        """
        job = {
            "mode": "call", "code": code, "function": function, "seconds": seconds,
            "inputs": sandbox_child.encode(inputs),
        }  # fmt: skip
        outcome = self._run(job, "", in_all)
        lines = outcome.output.splitlines()
        if outcome.status != "ok" or len(lines) != len(inputs):
            return None
        try:
            results = [json.loads(line) for line in lines]
            return [(sandbox_child.decode(value), float(taken)) for value, taken in results]
        except (ValueError, TypeError, KeyError, AttributeError, ArithmeticError):
            return None  # the program wrote the report itself

    def passes(self, code: str, asserts: list[str], seconds: float) -> bool:
        """Whether the assertions hold after the program; it may not end early."""
        token = secrets.token_hex(16)
        job = {"mode": "asserts", "code": code, "asserts": asserts, "token": token}
        return self._run(job, "", seconds).output == token

    def _run(self, job: dict[str, Any], text: str, seconds: float) -> Outcome:
        limits = {"memory_mb": self.memory_mb, "seconds_in_all": seconds, "output_mb": OUTPUT_MB}
        file = self.folder / "job.json"
        file.write_text(json.dumps(job | limits | {"parent": os.getpid()}), encoding="utf-8")
        with tempfile.TemporaryFile() as given, tempfile.TemporaryFile() as written:
            given.write(text.encode())
            given.seek(0)
            process = subprocess.Popen(
                [sys.executable, "-I", sandbox_child.__file__, str(file)],
                stdin=given, stdout=written, stderr=subprocess.DEVNULL, cwd=self.folder,
                env={"PATH": os.defpath, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
                start_new_session=True,
            )  # fmt: skip
            try:
                code = process.wait(seconds * WALL)
            except subprocess.TimeoutExpired:
                code = -signal.SIGXCPU
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            if code == sandbox_child.NO_SANDBOX:
                raise UserError(
                    "programs in answers run only under seccomp on Linux x86-64, which this "
                    "machine lacks; leave the code problems out."
                )
            written.seek(0)
            is_late = code in (-signal.SIGXCPU, -signal.SIGKILL)  # SIGKILL: it ignored the former
            status = "ok" if code == 0 else "timeout" if is_late else "failed"
            return Outcome(status, written.read().decode("utf-8", "replace"))


@contextlib.contextmanager
def sandbox(memory_mb: int = 4096) -> Iterator[Sandbox]:
    """A sandbox in a temporary folder."""
    with tempfile.TemporaryDirectory(prefix="iwopd-") as folder:
        yield Sandbox(Path(folder), memory_mb)
