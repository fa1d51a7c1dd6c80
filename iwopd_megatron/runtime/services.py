"""Servers that a run starts beside itself: teacher services, rollout servers.

Each is a process group of its own with its output in a log file. It is killed with the thread that
started it (Linux), so that no server outlives a killed run and holds its port and memory.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import httpx

from iwopd_megatron.errors import ServiceError

# Runs argv[2:] and ends as it does. When the process argv[1] that started it is gone, the kernel
# tells it so, and it kills its whole process group: an engine's children would outlive the engine.
_LAUNCHER = """
import ctypes, os, signal, subprocess, sys
command = None
signal.signal(signal.SIGTERM, lambda *_: command and command.terminate())
signal.signal(signal.SIGUSR1, lambda *_: os.killpg(0, signal.SIGKILL))
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, signal.SIGUSR1)
    if os.getppid() != int(sys.argv[1]):
        sys.exit(1)
command = subprocess.Popen(sys.argv[2:])
code = command.wait()
sys.exit(code if code >= 0 else 128 - code)
"""
PROBE_SECONDS = 5.0  # for an answer of /health


def outer_environment() -> dict[str, str]:
    """Return this process's environment without what makes it a rank of a torchrun world."""
    own = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    ours = ("GROUP_", "ROLE_", "TORCHELASTIC_")
    return {k: v for k, v in os.environ.items() if k not in own and not k.startswith(ours)}


def health(url: str, path: str = "/health") -> int | None:
    """Return the HTTP status of a server's answer; None without one in `PROBE_SECONDS`."""
    try:  # without verify=False every probe reads the machine's certificates, tens of milliseconds
        reply = httpx.get(url + path, timeout=PROBE_SECONDS, trust_env=False, verify=False)
        return reply.status_code
    except httpx.TransportError:
        return None


def is_answering(url: str) -> bool:
    """Return whether a server that was ready is still there.

    SGLang's /health generates a token and hangs while weights change; this path answers at once, if
    only to say that it is unknown.
    """
    return health(url, "/model_info") is not None


def free_port() -> int:
    """Return a TCP port that nothing listens on.

    Below 32768, where Linux's outgoing ports begin: one that `bind(0)` found would lie among those,
    and a connection could take it before the server does.
    """
    while True:
        port = random.SystemRandom().randrange(20000, 32768)
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.bind(("", port))
            return port


class Server:
    """A command that answers HTTP at `url`; its /health is 200 once it is ready.

    env: its whole environment; None: `outer_environment()`. log: where its output goes.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        env: Mapping[str, str] | None,
        log: Path,
        url: str,
    ):
        self.name, self.command, self.log, self.url = name, list(command), log, url
        self.env = outer_environment() if env is None else dict(env)
        self.process: subprocess.Popen | None = None

    @property
    def is_running(self) -> bool:
        """Return whether its process was started and has not ended."""
        return self.process is not None and self.process.poll() is None

    @property
    def exit_code(self) -> int | None:
        """Return the code its process was last seen to end with; None: not started, or running."""
        return None if self.process is None else self.process.returncode

    def start(self) -> None:
        """Start the command; its output goes to the end of the log."""
        self.log.parent.mkdir(parents=True, exist_ok=True)
        launcher = [sys.executable, "-S", "-c", _LAUNCHER, str(os.getpid())]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [*launcher, *self.command],
                env=self.env,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def wait_ready(self, timeout: float, stop: Callable[[], bool] = lambda: False) -> None:
        """Return when /health is 200 or `stop()`; ServiceError if it dies or after `timeout` s."""
        end = time.monotonic() + timeout
        while not stop():
            if not self.is_running:
                raise ServiceError(
                    f"{self.name} ended with exit code {self.exit_code} before it was "
                    f"ready; the last line of {self.log} is: {self.last_line()}"
                )
            if self.health() == 200:
                return
            if time.monotonic() > end:
                raise ServiceError(
                    f"{self.name} was not ready within {timeout:g} seconds; "
                    f"the last line of {self.log} is: {self.last_line()}"
                )
            time.sleep(0.1)

    def health(self) -> int | None:
        """Return the HTTP status of /health; None without an answer."""
        return health(self.url)

    def restart(self) -> None:
        """Kill what is left of it and start it again on the same port; not yet ready on return."""
        self.kill()
        self.start()

    def stop(self, grace: float = 30.0) -> None:
        """Send SIGTERM, and SIGKILL to what is left after `grace` seconds."""
        process = self.process
        if process is not None and process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGTERM)  # its ranks hear of it from the command
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(grace)
        self.kill()

    def kill(self, only: subprocess.Popen | None = None) -> None:
        """Send SIGKILL to the whole process group; a no-op when it is gone.

        only: spare a later process, which was started since that one was seen to fail.
        """
        process = self.process
        if process is None or only not in (None, process):
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()

    def last_line(self) -> str:
        """Return the log's last line with text, at most 300 characters, else '(empty)'."""
        if not self.log.is_file():
            return "(empty)"
        with self.log.open("rb") as log:
            log.seek(max(0, self.log.stat().st_size - 4096))
            lines = log.read().decode(errors="replace").split("\n")
        return next((line.strip()[:300] for line in reversed(lines) if line.strip()), "(empty)")
