"""Memory and cores of this machine: what there is for a process. Imports no torch.

A container's limits are its control group's, of it or of a group above. Memory: memory.max (version
2) or memory.limit_in_bytes (version 1), less what is in use but could not be given back. Cores:
cpu.max, or cpu.cfs_quota_us over cpu.cfs_period_us.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

PROC, GROUPS = Path("/proc"), Path("/sys/fs/cgroup")


def available() -> int:
    """Return bytes that processes can still take: MemAvailable or the limit's rest, if less."""
    match = re.search(r"^MemAvailable:\s+(\d+) kB", _text(PROC / "meminfo"), re.MULTILINE)
    found = [int(match[1]) * 1024] if match else []
    found += [rest for group in _groups("memory") if (rest := _rest(group)) is not None]
    return min(found, default=2**63)


def give_back() -> None:
    """Return to the system what this process has freed, as far as its C library can.

    glibc keeps freed blocks of up to 32 MiB: after a model was loaded they add up to its weights.
    """
    if sys.platform == "linux":
        with contextlib.suppress(AttributeError):  # another C library
            ctypes.CDLL(None).malloc_trim(0)


def own_cores() -> int:
    """Return a process's share of the cores: those it may use, over the world's processes here.

    At least 1. Processes of one world have torchrun's LOCAL_WORLD_SIZE.
    """
    cores: float = len(os.sched_getaffinity(0))
    for group in _groups("cpu"):
        cores = min(cores, _quota(group))
    return max(1, int(cores / int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))


def _quota(group: Path) -> float:
    """Return how many cores' time a group's processes get; infinite where that has no limit."""
    text = _text(group / "cpu.max") or " ".join(
        _text(group / f"cpu.cfs_{name}_us") for name in ("quota", "period")
    )
    match = re.match(r"(\d+)\s+(\d+)", text)  # elsewhere "max", or -1
    return int(match[1]) / int(match[2]) if match else math.inf


def _groups(kind: str) -> Iterator[Path]:
    """Yield the folders of this process's control group of a kind, and of those above."""
    for line in _text(PROC / "self/cgroup").splitlines():
        _, kinds, name = line.split(":", 2)
        if kinds and kind not in kinds.split(","):
            continue
        root = GROUPS / kind if kinds else GROUPS
        folder = root / name.lstrip("/")
        # inside a container its own group may be mounted as the root
        yield from (folder, *(above for above in folder.parents if above.is_relative_to(root)))


def _rest(group: Path) -> int | None:
    """Return what a group's limit leaves, None where it has none."""
    for limit, usage, stat in (
        ("memory.max", "memory.current", "inactive_file"),
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ):
        most, used = _text(group / limit).strip(), _text(group / usage).strip()
        if most.isdigit() and used.isdigit():
            cache = re.search(rf"^{stat} (\d+)$", _text(group / "memory.stat"), re.MULTILINE)
            return max(0, int(most) - int(used) + (int(cache[1]) if cache else 0))
    return None


def _text(file: Path) -> str:
    try:
        return file.read_text()
    except OSError:
        return ""
