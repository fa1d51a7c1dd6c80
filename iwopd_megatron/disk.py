"""A disk that takes no more: told from other trouble, and what a run that met it says.

An OSError has its number; libraries that write by themselves (safetensors, torch) raise errors of
their own, whose text has the system's words.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path

from iwopd_megatron.errors import DiskError, UserError
from iwopd_megatron.preflight_resume import checkpoints

NUMBERS = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.EFBIG)
WORDS = [os.strerror(number) for number in NUMBERS]
ROOM = WORDS[:2]  # what room mends
TORCH = "PytorchStreamWriter failed"  # all that torch says of it


def disk_reason(error: BaseException | str | None) -> str | None:
    """The system's words if an error, or what it was raised from, is the disk's; else None."""
    if isinstance(error, OSError) and error.errno in NUMBERS:
        return os.strerror(error.errno)
    text = str(error)
    found = next((words for words in WORDS if words in text), None)
    if found is not None or not isinstance(error, BaseException):
        return found
    before = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    if before is not None:
        return disk_reason(before)
    return "the file could not be written whole" if TORCH in text else None


def disk_error(run: Path, error: BaseException | str) -> DiskError | None:
    """What to raise instead of an error in a run; None if it is not the disk's."""
    reason = None if isinstance(error, UserError) else disk_reason(error)
    if reason is None:
        return None
    file = getattr(error, "filename", None) or f"a file of {run}"
    saved = checkpoints(run)
    last = f"the last good checkpoint is {saved[-1]}" if saved else "there is no checkpoint yet"
    remedy = "make room" if reason in ROOM else "mend that"
    return DiskError(
        f"{file} could not be written ({reason}); {last}: {remedy} and go on with --resume."
    )


@contextlib.contextmanager
def disk_told(run: Path) -> Iterator[None]:
    """What the disk does to the run inside becomes a DiskError."""
    try:
        yield
    except Exception as error:
        found = disk_error(run, error)
        if found is None:
            raise
        raise found from error
