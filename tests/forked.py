"""Commands of the project as processes of their own, forked from one that has imported Megatron.

`iwopd("train", recipe)` is `python -W ignore -m iwopd_megatron train ...`, without the seconds that
a new interpreter imports for. New interpreters: tests/with_runs/test_wheel.py, bench/drill.py.
"""

import atexit
import contextlib
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    ["iwopd_megatron.cli.main", "iwopd_megatron.cli.worker", "iwopd_megatron.report.page"]
)


class Command:
    """A Python started with these arguments, as `subprocess.Popen`: -m MODULE, -c CODE or a file.

    output: stdout and stderr together, appended; without it `communicate` has the two. A group of
    its own: `os.killpg(pid)` kills it and what it started.
    """

    def __init__(
        self,
        *arguments: Any,
        cwd: Path = ROOT,
        env: Mapping[str, str] | None = None,
        output: Path | None = None,
    ):
        self.args = list(map(str, arguments))
        self._folder = tempfile.TemporaryDirectory(prefix="forked")
        self._files = [output or Path(self._folder.name, name) for name in ("out", "err")]
        given = (self.args, str(cwd), dict(os.environ if env is None else env), self._files)
        self._process = _CONTEXT.Process(target=_become, args=given)
        self._process.start()
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired(self.args, timeout)
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Wait; what it wrote to stdout and to stderr. Killed with its group after `timeout`."""
        try:
            self.wait(timeout)
        except subprocess.TimeoutExpired:
            self.kill()
            raise
        out, err = (file.read_text() for file in self._files)
        return out, err

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self._process.join()


def python(*arguments: Any, timeout: float = 400, **place: Any) -> subprocess.CompletedProcess[str]:
    """Run it to its end."""
    command = Command(*arguments, **place)
    out, err = command.communicate(timeout)
    return subprocess.CompletedProcess(command.args, command.returncode, out, err)


def iwopd(*words: Any, **place: Any) -> subprocess.CompletedProcess[str]:
    return python("-m", "iwopd_megatron", *words, **place)


def started(*words: Any, **place: Any) -> Command:
    """`iwopd` while it runs."""
    return Command("-m", "iwopd_megatron", *words, **place)


def _become(arguments: list[str], cwd: str, env: dict[str, str], files: list[Path]) -> None:
    os.setpgrp()
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    for file, number in zip(files, (1, 2), strict=True):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    warnings.simplefilter("ignore")
    try:
        _execute(*arguments)
    finally:
        atexit._run_exitfuncs()


def _execute(kind: str, *rest: str) -> None:
    if kind == "-m":
        sys.argv = list(rest)
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    elif kind == "-c":
        sys.argv = ["-c", *rest[1:]]
        exec(rest[0], {"__name__": "__main__"})
    else:
        sys.argv = [kind, *rest]
        runpy.run_path(kind, run_name="__main__")
