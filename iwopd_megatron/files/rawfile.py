"""Files written at planned positions by several threads, folders that appear only when complete."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import mmap
import os
import shutil
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import torch

from iwopd_megatron.errors import RecipeError
from iwopd_megatron.files import lock
from iwopd_megatron.files.iterations import TRACKER

PAGE, STAGE = 4096, 16 * 2**20
UNFINISHED = "unfinished.jsonl"  # see weights/continuation.py
_local = threading.local()


def return_large_blocks() -> None:
    """Make glibc give freed blocks of a megabyte or more back to the system at once.

    It would keep blocks of many sizes in pieces, more the longer a conversion runs.
    """
    if sys.platform == "linux":
        mmap_threshold = -3
        with contextlib.suppress(AttributeError):  # another C library
            ctypes.CDLL(None).mallopt(mmap_threshold, 2**20)


def raw(tensor: torch.Tensor) -> memoryview:
    """Return the bytes of a contiguous CPU tensor, without a copy."""
    return tensor.detach().reshape(-1).view(torch.uint8).numpy().data


class OutputFile:
    """A file of planned size, written at any positions by several threads.

    Whole pages go past the page cache (O_DIRECT) where the file system allows it: the cache would
    need as much fresh memory as the model has bytes, which on a virtual machine is slower to get
    than the disk is to write, and would push everything else out.
    """

    def __init__(self, path: Path, size: int):
        """Open a file of `size` bytes: a new one, or one that an interrupted run left, as it is."""
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        os.ftruncate(self._descriptor, size)
        self._direct: int | None = None
        with contextlib.suppress(OSError):  # some file systems know no O_DIRECT
            self._direct = os.open(path, os.O_RDWR | getattr(os, "O_DIRECT", 0))

    def write(self, data: memoryview | bytes, position: int) -> None:
        """Write all of `data` at a position in bytes. Any thread may call it."""
        data = memoryview(data)
        first, last = -position % PAGE, (position + len(data)) // PAGE * PAGE - position
        if self._direct is None or first >= last:
            _pwrite(self._descriptor, data, position)
            return
        _pwrite(self._descriptor, data[:first], position)
        _pwrite(self._descriptor, data[last:], position + last)
        self._write_pages(self._direct, data[first:last], position + first)

    def _write_pages(self, direct: int, pages: memoryview, position: int) -> None:
        """Write whole pages past the page cache, through this thread's aligned buffer."""
        stage = _stage()
        for start in range(0, len(pages), STAGE):
            part = pages[start : start + STAGE]
            stage[: len(part)] = part
            try:
                _pwrite(direct, stage[: len(part)], position + start)
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
                _pwrite(self._descriptor, part, position + start)  # the disk has larger pages

    def read(self, position: int, nbytes: int) -> torch.Tensor:
        """Return bytes of the file as uint8 [nbytes], from the disk rather than the page cache."""
        first = position // PAGE * PAGE
        buffer = mmap.mmap(-1, -(-(position + nbytes - first) // PAGE) * PAGE or PAGE)
        descriptor = self._descriptor if self._direct is None else self._direct
        done, wanted = 0, position + nbytes - first
        while done < wanted:
            count = os.preadv(descriptor, [memoryview(buffer)[done:]], first + done)
            if count == 0:
                break
            done += count
        return torch.frombuffer(buffer, dtype=torch.uint8, count=nbytes, offset=position - first)

    def close(self) -> None:
        """Close the file; what was written need not be on disk yet (`flush`)."""
        os.close(self._descriptor)
        if self._direct is not None:
            os.close(self._direct)


def _pwrite(descriptor: int, data: memoryview, position: int) -> None:
    """Write all of `data`; one call of pwrite takes at most 2 GiB."""
    done = 0
    while done < len(data):
        done += os.pwrite(descriptor, data[done:], position + done)


def _stage() -> memoryview:
    """Return this thread's buffer of STAGE bytes, aligned to a page as O_DIRECT needs it.

    Private: forked processes, which inherit it, write at the same time.
    """
    if not hasattr(_local, "stage"):
        _local.stage = mmap.mmap(-1, STAGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return memoryview(_local.stage)


@contextlib.contextmanager
def complete_folder(
    out: Path, nbytes: int, force: bool, sources: tuple[Path, ...] = ()
) -> Iterator[Path]:
    """Give a sibling folder to write into; flush it to disk and rename it to `out` at the end.

    Until then `out` is as it was. The sibling stays after an interruption, for the next run to go
    on with, and goes away after an error that the next run would meet again. RecipeError if `out`
    exists (unless `force`), holds one of `sources`, is being written by another process, or
    `nbytes` do not fit on its disk.
    """
    check_free(out, nbytes, force, sources)
    partial = _partial(out)
    try:
        with lock.locked(partial):
            try:
                yield partial
                for path in [*partial.rglob("*"), partial]:
                    flush(path)
                for name in (UNFINISHED, lock.NAME):
                    (partial / name).unlink(missing_ok=True)
                _rename(partial, out)
            except RecipeError:
                shutil.rmtree(partial)
                raise
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        shutil.rmtree(partial)
        raise RecipeError(
            f"the disk of {out} became full; free {nbytes / 1e9:.1f} GB there and start again."
        ) from None


def _partial(out: Path) -> Path:
    return out.with_name(out.name + ".partial")


def _rename(partial: Path, out: Path) -> None:
    if out.exists():
        old = out.with_name(out.name + ".replaced")
        shutil.rmtree(old, ignore_errors=True)
        out.rename(old)
        partial.rename(out)
        shutil.rmtree(old)
    else:
        partial.rename(out)
    flush(out.parent)


def check_free(out: Path, nbytes: int, force: bool, sources: tuple[Path, ...]) -> None:
    """Refuse an output folder that would overwrite something or does not fit; RecipeError.

    As `complete_folder`, but before anything is written.
    """
    if out.exists() and not force:
        raise RecipeError(f"{out} already exists; choose another folder, or add --force.")
    if out.exists() and not is_own(out):
        raise RecipeError(
            f"{out} is no model folder or checkpoint, so --force does not replace it; "
            "choose another folder."
        )
    for source in sources:
        if out.exists() and out.resolve() in (source.resolve(), *source.resolve().parents):
            raise RecipeError(f"{out} holds the input {source}; choose another folder.")
    out.parent.mkdir(parents=True, exist_ok=True)
    # what an interrupted run left is used again, or removed
    left = sum(path.lstat().st_blocks * 512 for path in _partial(out).rglob("*"))
    free = shutil.disk_usage(out.parent).free + left
    if nbytes > free:
        raise RecipeError(
            f"{out} needs {_size(nbytes)} and its disk has {_size(free)} free; "
            "choose another disk or free some."
        )


def _size(nbytes: int) -> str:
    return f"{nbytes / 1e9:.1f} GB" if nbytes >= 1e8 else f"{nbytes / 1e6:.2f} MB"


def is_own(folder: Path) -> bool:
    """Return whether a folder may be replaced: it is empty, or a model's or a checkpoint's."""
    if not folder.is_dir():
        return False
    known = ("config.json", "metadata.json", "manifest.json", TRACKER)
    return not any(folder.iterdir()) or any((folder / name).is_file() for name in known)


def flush(path: Path) -> None:
    """Wait until a file or folder is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)
