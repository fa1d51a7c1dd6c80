"""A disk that takes no more: told from other trouble, and what a run that met it says.

An OSError has its number; libraries that write by themselves (safetensors) raise errors of
their own, whose text has the system's words.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path

from iwopd_megatron.errors import DiskError, UserError
from iwopd_megatron.records.resume import checkpoints

NUMBERS = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.EFBIG)
WORDS = [os.strerror(number) for number in NUMBERS]
ROOM = WORDS[:2]  # what room mends


def disk_reason(error: BaseException) -> str | None:
    """Return the system's words if an error or its cause is the disk's; None otherwise."""
    if isinstance(error, OSError) and error.errno in NUMBERS:
        return os.strerror(error.errno)
    found = next((words for words in WORDS if words in str(error)), None)
    if found is not None:
        return found
    before = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return None if before is None else disk_reason(before)


def disk_error(what: Path, reason: str, run: Path | None = None) -> DiskError:
    """Return the error that `what` was not written. run: the folder of a run, which can resume."""
    remedy = "make room" if reason in ROOM else "mend that"
    if run is None:
        return DiskError(
            f"{what} could not be written ({reason}): {remedy} and give the command again."
        )
    saved = checkpoints(run)
    last = f"the last good checkpoint is {saved[-1]}" if saved else "there is no checkpoint yet"
    return DiskError(
        f"{what} could not be written ({reason}); {last}: {remedy} and go on with --resume."
    )


@contextlib.contextmanager
def disk_told(out: Path, is_run: bool = True) -> Iterator[None]:
    """Turn errors of the disk inside into a DiskError. is_run: `out` is a run folder."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        reason = disk_reason(error)
        if reason is None:
            raise
        what = Path(getattr(error, "filename", None) or out)
        raise disk_error(what, reason, out if is_run else None) from error
