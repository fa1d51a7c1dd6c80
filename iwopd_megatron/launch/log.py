"""`iwopd attach`: the output of all roles of a launch as it grows, over its requeues."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from pathlib import Path

from iwopd_megatron.launch.rendezvous import FINAL, POLL_SECONDS, Rendezvous, newest_attempt
from iwopd_megatron.launch.roles import Job, read_job


def follow(launch: Path) -> Iterator[str]:
    """Yield the lines of all roles' logs until the job is over and no attempt can follow.

    launch: the launch folder. A line begins with its role, and its attempt after the first.
    """
    job = read_job(launch)
    places: dict[Path, int] = {}  # bytes of each log that were read
    names: dict[Path, str] = {}
    while True:
        is_over = _is_over(launch, job)
        for file in sorted(launch.glob("experiments/*/*/*/log-*.out")):
            names.setdefault(file, _name(file, job))
            with file.open("rb") as stream:
                stream.seek(places.get(file, 0))
                whole = stream.read().rpartition(b"\n")[0]
            if whole:
                places[file] = places.get(file, 0) + len(whole) + 1
                for line in whole.decode(errors="replace").split("\n"):
                    yield f"{names[file]} | {line.rstrip()}"
        if is_over:
            return
        time.sleep(POLL_SECONDS)


def _name(file: Path, job: Job) -> str:
    """Return the role of log-iwopd.RUN-GROUP_JOB_ATTEMPT.out, and its attempt after the first."""
    found = re.search(r"-(\d+)_\d+_(\d+)\.out$", file.name)
    if found is None:
        return "job"
    role, attempt = job.roles[int(found[1])].name, int(found[2])
    return f"{role} attempt {attempt}" if attempt else role


def _is_over(launch: Path, job: Job) -> bool:
    """Return whether the newest attempt ended and no other can follow."""
    attempt = newest_attempt(launch)
    if attempt is None:
        return False
    code = Rendezvous(launch, attempt).finished
    is_last = attempt >= job.requeues or (launch / FINAL).exists()
    return code is not None and (code == 0 or is_last)
