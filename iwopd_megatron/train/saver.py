"""Checkpoints written beside the training: a forked process writes this rank's state as it was.

All ranks plan the files (sharded_save.py), one process a rank writes them, the main rank completes.
A fork keeps the memory of its moment, copied only where training changes it meanwhile; states on a
GPU are copied to the host before. A checkpoint appears by one rename when all ranks have written.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import xxhash

from iwopd_megatron.errors import CheckpointError, UserError
from iwopd_megatron.files.rawfile import flush
from iwopd_megatron.hf.companions import FOLDER as COMPANIONS
from iwopd_megatron.records.disk import disk_error, disk_reason, disk_told
from iwopd_megatron.runtime import device
from iwopd_megatron.runtime.host import available
from iwopd_megatron.runtime.parallel import Parallel, any_rank, gather
from iwopd_megatron.runtime.stop import die_with_parent
from iwopd_megatron.train.sharded_save import RankFiles, ShardedSave
from iwopd_megatron.weights.torch_dist.writer import Contents

LISTING = "files.json"
OWN_BYTES = 2**20  # more than common.pt, .metadata and the listing of a small model need
Listing = dict[str, tuple[int, str]]  # file name -> size, xxh3_64


class Failure(NamedTuple):
    """Why a rank's files were not written."""

    text: str  # a verb and the rest
    reason: str | None = None  # of the disk


@dataclass
class Outcome:
    """What a rank's writer has done."""

    listing: Listing = field(default_factory=dict)
    failure: Failure | None = None


class Saver:
    """The checkpoints of one run, written one at a time; the newest `keep` stay."""

    def __init__(
        self,
        run: Path,
        keep: int,
        in_background: bool,
        parallel: Parallel,
        companions: Callable[[Path], None] = lambda folder: None,
    ):
        """`companions` writes into a checkpoint's own folder what goes with its weights."""
        self._write_companions = companions
        self.run, self.folder, self.keep, self.parallel = run, run / "checkpoints", keep, parallel
        self.in_background = in_background
        self._pending: _Pending | None = None

    def start(self, state: dict[str, Any], round_number: int) -> None:
        """Begin the checkpoint of a round, after the one before is complete. Collective."""
        self.finish()
        final = self.folder / f"round_{round_number:06d}"
        partial = final.with_suffix(".partial")
        with disk_told(self.run):
            self.parallel.on_main(lambda: self._make_room(partial))
            save = ShardedSave(state, partial, self.parallel)
        self._pending = _Pending(final, partial, save, _start_writer(save))
        if not self.in_background:
            self.finish()

    def _make_room(self, partial: Path) -> None:
        """Make an empty folder to write into; what a crash left of others is removed.

        OSError, before any rank begins, where the disk has no room for the part that rank 0 writes
        alone: later the other ranks would wait for it.
        """
        self._remove_partial()
        partial.mkdir(parents=True)
        with tempfile.TemporaryFile(dir=partial) as file:
            file.write(bytes(OWN_BYTES))
        self._write_companions(partial / COMPANIONS)

    def _remove_partial(self) -> None:
        for left in self.folder.glob("round_*.partial"):
            shutil.rmtree(left, ignore_errors=True)

    def poll(self) -> None:
        """Complete the pending checkpoint if all ranks have written theirs. One all-reduce."""
        if self._pending is not None and not any_rank(not self._pending.writer.is_over()):
            self.finish()

    def make_way(self, nbytes: int) -> None:
        """Wait for the pending checkpoint if there is no room to train beside it. Collective.

        While writers live, what training changes is there twice: `nbytes` of each process here.
        """
        needed = nbytes * int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        if self._pending is not None and any_rank(not device.has_gpu() and available() < needed):
            self.finish()

    def finish(self) -> None:
        """Wait for the pending checkpoint and complete it. Collective.

        CheckpointError or DiskError on every rank if a writer failed or died on any.
        """
        pending, self._pending = self._pending, None
        if pending is None:
            return
        own = pending.writer.outcome(), pending.save.contents
        parts: list[tuple[Outcome, Contents]] = gather(own)
        try:
            for rank, (outcome, _) in enumerate(parts):
                if outcome.failure is not None:
                    raise self._error(pending.final, rank, outcome.failure)
            with disk_told(self.run):
                self.parallel.on_main(lambda: self._publish(pending, parts))
        except UserError:
            if self.parallel.is_main:
                self._remove_partial()  # room for others
            raise

    def _error(self, final: Path, rank: int, failure: Failure) -> UserError:
        if failure.reason is not None:
            return disk_error(final, failure.reason, self.run)
        return CheckpointError(
            f"{final} was not written, for the writer of rank {rank} {failure.text}; checkpoints "
            "before it are whole: mend that and go on with --resume."
        )

    def _publish(self, pending: _Pending, parts: list[tuple[Outcome, Contents]]) -> None:
        """Complete the checkpoint, list its files, rename the folder, remove the oldest ones."""
        pending.save.complete(contents for _, contents in parts)
        listing: Listing = {}
        for outcome, _ in parts:
            listing |= outcome.listing
        for file in pending.partial.rglob("*"):
            name = str(file.relative_to(pending.partial))
            if file.is_file() and name not in listing:
                listing[name] = file.stat().st_size, digest(file)
                flush(file)
        (pending.partial / LISTING).write_text(json.dumps(listing))
        flush(pending.partial / LISTING)
        flush(pending.partial)
        if pending.final.exists():
            shutil.rmtree(pending.final)
        pending.partial.rename(pending.final)
        flush(self.folder)
        for old in sorted(self.folder.glob("round_??????"))[: -self.keep]:
            shutil.rmtree(old)


class _Writer:
    """The process that writes this rank's files."""

    def __init__(self, files: RankFiles):
        """Fork it, with the memory as it is now."""
        context = multiprocessing.get_context("fork")
        self._connection, end = context.Pipe(duplex=False)
        self._process = context.Process(target=_write, args=(files, end))
        self._process.start()
        end.close()  # the writer's is then the only one, and closes with it

    def is_over(self) -> bool:
        """Return whether it has said what it did, or died."""
        return self._connection.poll()

    def outcome(self) -> Outcome:
        """Wait for what it sends at its end."""
        outcome: Outcome | None
        try:
            outcome = self._connection.recv()
        except EOFError:
            outcome = None
        self._process.join()
        if outcome is not None:
            return outcome
        code = self._process.exitcode
        if code is not None and code < 0:
            return Outcome(failure=Failure(f"died ({signal.Signals(-code).name})"))
        return Outcome(failure=Failure(f"died (exit code {code})"))


class _NoWriter:
    """Stands for the writer on a rank that has no files to write."""

    def is_over(self) -> bool:
        """Return True."""
        return True

    def outcome(self) -> Outcome:
        """Return that nothing was written and nothing failed."""
        return Outcome()


def _start_writer(save: ShardedSave) -> _Writer | _NoWriter:
    """Start the writer of this rank's files; this process keeps no copy of their data."""
    files = save.take_files()
    return _NoWriter() if files is None else _Writer(files)


@dataclass(frozen=True)
class _Pending:
    """A checkpoint whose files are being written."""

    final: Path
    partial: Path
    save: ShardedSave
    writer: _Writer | _NoWriter


def _write(files: RankFiles, connection: Connection) -> None:
    """Run as the writer process: write all files of this rank, send the Outcome."""
    die_with_parent()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # a run that is stopped waits for its checkpoint
    try:
        connection.send(_write_files(files))
    except Exception as error:
        failure = Failure(f"failed ({error})", disk_reason(error))
        connection.send(Outcome(failure=failure))


def _write_files(files: RankFiles) -> Outcome:
    outcome = Outcome()
    for file in files.write():
        flush(file)
        outcome.listing[file.name] = file.stat().st_size, digest(file)
    return outcome


def digest(file: Path) -> str:
    """Return the xxh3_64 of a file as hexadecimal digits."""
    state = xxhash.xxh3_64()
    with file.open("rb") as stream:
        while block := stream.read(2**24):
            state.update(block)
    return state.hexdigest()
