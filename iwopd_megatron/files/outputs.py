"""Whether what a command will write can be written: asked before its work starts.

The file system is asked by writing, for permissions do not tell of /proc, a read-only disk, a name
that is too long, or a disk without room. Nothing that was not there stays.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from pathlib import Path

from iwopd_megatron.errors import RecipeError

PROBE_BYTES = 4096


def check_folder(folder: Path, option: str) -> None:
    """Refuse an output folder, there or not yet, that takes no files; RecipeError.

    option: how the user names it, e.g. out, --out.
    """
    made: list[Path] = []
    try:
        missing = [place for place in (folder, *folder.parents) if not os.path.lexists(place)]
        for place in reversed(missing):
            place.mkdir(exist_ok=True)
            made.append(place)
        if not folder.is_dir():
            raise RecipeError(f"{option}={folder} is no folder; choose another place.")
        with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
            file.write(bytes(PROBE_BYTES))
    except (OSError, ValueError) as error:  # ValueError: a name that no file system has
        if isinstance(error, RecipeError):
            raise
        raise _refusal(folder, option, error) from None
    finally:
        for place in reversed(made):
            with contextlib.suppress(OSError):  # another process may use it already
                place.rmdir()


def check_file(file: Path, option: str) -> None:
    """Refuse an output file whose folder is not there or takes no files; RecipeError.

    option: how the user names it.
    """
    try:
        if file.is_dir():
            raise RecipeError(f"{option}={file} is a folder; name a file.")
        if not file.parent.is_dir():
            raise RecipeError(
                f"{option}={file}: there is no folder {file.parent}; make it, or choose another."
            )
        if file.exists():
            os.close(os.open(file, os.O_WRONLY))
    except OSError as error:
        raise _refusal(file, option, error) from None
    check_folder(file.parent, option)


def _refusal(place: Path, option: str, error: OSError | ValueError) -> RecipeError:
    why = error.strerror if isinstance(error, OSError) else str(error)
    return RecipeError(
        f"{option}={place} cannot be written to ({why}); choose another place, or mend that one."
    )
