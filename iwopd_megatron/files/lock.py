"""One writer a folder: a lock the kernel drops when its process dies, on local and NFS disks."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from iwopd_megatron.errors import RecipeError

NAME = "lock"


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold `folder/lock`, whose text names the host and process that does.

    RecipeError if a living process holds it; that of a dead one is taken over. Where the file
    system has no locks, the text alone decides, and a holder on another host counts as living.
    """
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder / NAME, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        host, pid = _holder(descriptor)
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            is_held = False
        except OSError as error:
            has_locks = error.errno in (errno.EACCES, errno.EAGAIN)
            is_held = has_locks or _may_live(host, pid)
        if is_held:
            raise RecipeError(
                f"{folder} is in use by process {pid} on {host}; wait until it ends, stop it, "
                f"or choose another folder (if it is gone, remove {folder / NAME})."
            )
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{socket.gethostname()} {os.getpid()}\n".encode(), 0)
        yield
        os.ftruncate(descriptor, 0)
    finally:
        os.close(descriptor)


def _holder(descriptor: int) -> tuple[str, str]:
    words = os.pread(descriptor, 4096, 0).decode(errors="replace").split()
    return (words[0], words[1]) if len(words) == 2 else ("", "")


def _may_live(host: str, pid: str) -> bool:
    """Return whether the holder that a lock's text names may be alive."""
    if not pid.isdigit() or host != socket.gethostname():
        return bool(host)
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return int(pid) != os.getpid()
