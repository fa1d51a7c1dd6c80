"""Memory of this machine: what there is for new processes, and what one holds. Imports no torch.

A container's limit is its control group's: memory.max (version 2) or memory.limit_in_bytes
(version 1) of it or of a group above, less what is in use but could not be given back.
"""

from __future__ import annotations

import contextlib
import ctypes
import re
import sys
from collections.abc import Iterator
from pathlib import Path

PROC, GROUPS = Path("/proc"), Path("/sys/fs/cgroup")


def available() -> int:
    """Return bytes that processes can still take: MemAvailable or the limit's rest, if less."""
    match = re.search(r"^MemAvailable:\s+(\d+) kB", _text(PROC / "meminfo"), re.MULTILINE)
    found = [int(match[1]) * 1024] if match else []
    found += [rest for group in _groups() if (rest := _rest(group)) is not None]
    return min(found, default=2**63)


def give_back() -> None:
    """Return to the system what this process has freed, as far as its C library can.

    glibc keeps freed blocks of up to 32 MiB: after a model was loaded they add up to its weights.
    """
    if sys.platform == "linux":
        with contextlib.suppress(AttributeError):  # another C library
            ctypes.CDLL(None).malloc_trim(0)


def _groups() -> Iterator[Path]:
    """Yield the folders of this process's control group and of those above."""
    for line in _text(PROC / "self/cgroup").splitlines():
        _, kinds, name = line.split(":", 2)
        if kinds and "memory" not in kinds.split(","):
            continue
        root = GROUPS / "memory" if kinds else GROUPS
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
