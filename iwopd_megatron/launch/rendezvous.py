"""Where the nodes of a launch meet: small files in a folder that all of them see.

An attempt (the job's first start, or a requeue) has a folder of its own, so that nothing said in an
earlier one is believed. A file appears whole, by a rename. Standard library only.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
from pathlib import Path
from typing import Any

POLL_SECONDS = 0.5
FINAL = "final.txt"  # why no further attempt is of use


class Rendezvous:
    """One attempt's folder of small files, through which agents tell each other what they know.

    launch: the launch folder; attempt: 0 for the job's first start, one more for each requeue.
    """

    def __init__(self, launch: Path, attempt: int):
        self.launch, self.attempt = launch, attempt
        self.folder = launch / f"attempt_{attempt}"
        (self.folder / "status").mkdir(parents=True, exist_ok=True)

    def post(self, name: str, value: Any) -> None:
        """Write `value` as JSON into the file `name`, over what it said before."""
        own = f"{socket.gethostname()}.{os.getpid()}"
        partial = self.folder / f"{name}.{own}.partial"
        partial.write_text(json.dumps(value))
        partial.replace(self.folder / name)

    def read(self, name: str) -> Any:
        """Return the value last posted under `name`; None before there is one."""
        with contextlib.suppress(FileNotFoundError):
            return json.loads((self.folder / name).read_text())
        return None

    def has(self, name: str) -> bool:
        """Return whether something was posted under `name`."""
        return (self.folder / name).exists()

    def finish(self, code: int) -> int:
        """Offer the job's exit code and return the one that holds: the first that was offered."""
        own = self.folder / f"finished.{socket.gethostname()}.{os.getpid()}.partial"
        own.write_text(str(code))
        decided = self.folder / "finished"
        with contextlib.suppress(FileExistsError):
            os.link(own, decided)
        own.unlink()
        return int(decided.read_text())

    @property
    def finished(self) -> int | None:
        """Return the job's exit code; None while it runs."""
        return self.read("finished")

    @property
    def stop_requested(self) -> bool:
        """Return whether the scheduler has warned that the time limit is near."""
        return self.has("stop")

    def status(self, role: str, node: int, state: str, **more: Any) -> None:
        """Post what `iwopd status` shows of a role's part on one node."""
        line = {"role": role, "node": node, "host": hostname(), "state": state, "time": time.time()}
        self.post(f"status/{role}-{node}.json", line | more)


def newest_attempt(launch: Path) -> int | None:
    """Return the number of a launch's last attempt; None before any of its roles has started."""
    attempts = [int(path.name.partition("_")[2]) for path in launch.glob("attempt_*")]
    return max(attempts, default=None)


def hostname() -> str:
    """Return how other nodes reach this one: its name where it resolves, else its address."""
    name = socket.gethostname()
    with contextlib.suppress(OSError):
        socket.getaddrinfo(name, None)
        return name
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:  # sends nothing
        probe.connect(("192.0.2.1", 9))
        return probe.getsockname()[0]
