"""Files written at planned positions by several threads, folders that appear only when complete."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from iwopd_megatron.errors import RecipeError


def raw(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, without a copy."""
    return memoryview(tensor.detach().reshape(-1).view(torch.uint8).numpy())


def create(file: Path, size: int) -> int:
    """Create a file of `size` bytes, without blocks (writing into reserved ones is slower)."""
    descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
    os.ftruncate(descriptor, size)
    return descriptor


def write_at(descriptor: int, tensor: torch.Tensor, position: int) -> None:
    """All bytes of a tensor at a position; pwrite takes at most 2 GiB at a time."""
    data = raw(tensor.contiguous())
    done = 0
    while done < len(data):
        done += os.pwrite(descriptor, data[done:], position + done)


@contextlib.contextmanager
def complete_folder(
    out: Path, nbytes: int, force: bool, sources: tuple[Path, ...] = ()
) -> Iterator[Path]:
    """A sibling folder to write into, flushed to disk and renamed to `out` at the end.

    After a failure or an interruption `out` is as it was, and the next run starts over. RecipeError
    if `out` exists (unless `force`), holds one of `sources`, or `nbytes` do not fit on its disk.
    """
    check_free(out, nbytes, force, sources)
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir()
        with _flushing(partial):
            yield partial
        for path in [*partial.rglob("*"), partial]:
            flush(path)
        if out.exists():
            old = out.with_name(out.name + ".replaced")
            shutil.rmtree(old, ignore_errors=True)
            out.rename(old)
            partial.rename(out)
            shutil.rmtree(old)
        else:
            partial.rename(out)
        flush(out.parent)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        shutil.rmtree(partial, ignore_errors=True)
        raise RecipeError(
            f"the disk of {out} became full; free {nbytes / 1e9:.1f} GB there and start again."
        ) from None


def check_free(out: Path, nbytes: int, force: bool, sources: tuple[Path, ...]) -> None:
    """Refuse what would overwrite or not fit, before anything is written."""
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
    free = shutil.disk_usage(out.parent).free
    if nbytes > free:
        raise RecipeError(
            f"{out} needs {nbytes / 1e9:.1f} GB and its disk has {free / 1e9:.1f} GB free; "
            "choose another disk or free some."
        )


def is_own(folder: Path) -> bool:
    """Whether a folder may be replaced: empty, or with a model's or a checkpoint's own file."""
    if not folder.is_dir():
        return False
    known = ("config.json", "metadata.json", "manifest.json")
    return not any(folder.iterdir()) or any((folder / name).is_file() for name in known)


@contextlib.contextmanager
def _flushing(folder: Path) -> Iterator[None]:
    """Send what is written to the disk meanwhile, so that the last flush finds little to do."""
    done = threading.Event()

    def work() -> None:
        while not done.wait(0.1):
            for path in folder.rglob("*"):
                flush(path)

    with ThreadPoolExecutor(1) as pool:
        flushing = pool.submit(work)
        try:
            yield
        finally:
            done.set()
        flushing.result()  # the disk reports an error once, and may have done so there


def flush(path: Path) -> None:
    """Wait until a file or folder is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)
