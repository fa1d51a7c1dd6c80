"""Checkpoints written beside the training: a forked process writes this rank's state as it was.

Megatron plans the files and writes `.metadata`; the writing between, by Megatron's own function, is
one process a rank here. (Megatron's has a process a file, and if one dies the rank waits for ever.)
A fork keeps the memory of its moment, copied only where training changes it meanwhile; states on a
GPU are copied to the host before. A checkpoint appears by one rename when all ranks have written.
"""

from __future__ import annotations

import json
import multiprocessing
import queue
import shutil
import signal
import tempfile
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import xxhash

from iwopd_megatron.errors import CheckpointError, UserError
from iwopd_megatron.files.rawfile import flush
from iwopd_megatron.hf.companions import FOLDER as COMPANIONS
from iwopd_megatron.records.disk import disk_error, disk_reason, disk_told
from iwopd_megatron.runtime.megatron import dist_checkpointing, filesystem_async
from iwopd_megatron.runtime.parallel import Parallel, any_rank, gather
from iwopd_megatron.runtime.stop import die_with_parent
from iwopd_megatron.weights.torch_dist import METADATA

# Where Megatron looks for what was written. Its own would be a manager process, which imports
# everything again and takes seconds.
filesystem_async._results_queue = queue.Queue()

LISTING = "files.json"
OWN_BYTES = 2**20  # more than common.pt, .metadata and the listing of a small model need
Listing = dict[str, tuple[int, str]]  # file name -> size, xxh3_64


class Failure(NamedTuple):
    """Why a rank's files were not written."""

    text: str  # a verb and the rest
    reason: str | None = None  # of the disk


class Saver:
    """Writes checkpoints of one run, one at a time, and keeps the newest `keep`."""

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
            request = dist_checkpointing.save(
                state, str(partial), content_metadata=METADATA, async_sharded_save=True
            )
        self._pending = _Pending(final, partial, request)
        if not self.in_background:
            self.finish()

    def _make_room(self, partial: Path) -> None:
        """An empty folder to write into; what a crash left of others goes.

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
        if self._pending is not None and not any_rank(not self._pending.is_over()):
            self.finish()

    def finish(self) -> None:
        """Wait for the pending checkpoint and complete it. Collective.

        CheckpointError or DiskError on every rank if a writer failed or died on any.
        """
        pending, self._pending = self._pending, None
        if pending is None:
            return
        own = pending.outcome()
        outcomes = gather(own if isinstance(own, Failure) else own[1])
        try:
            for rank, outcome in enumerate(outcomes):
                if isinstance(outcome, Failure):
                    raise self._error(pending.final, rank, outcome)
            listing = {k: v for outcome in outcomes for k, v in outcome.items()}
            with disk_told(self.run):
                pending.finalise(own[0])
                self.parallel.on_main(lambda: self._publish(pending, listing))
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

    def _publish(self, pending: _Pending, listing: Listing) -> None:
        """List what lies there, rename the folder, remove the oldest."""
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


class _Pending:
    """A checkpoint whose files a process writes: Megatron's request, and the process."""

    def __init__(self, final: Path, partial: Path, request: Any):
        self.final, self.partial, self._request = final, partial, request
        self._connection: Connection | None = None
        if request.async_fn is None:  # nothing is this rank's to write
            return
        transforms = request.async_fn.args[0]
        _, buckets, self._results = request.async_fn_args
        buckets = request.preload_fn()
        context = multiprocessing.get_context("fork")
        self._connection, end = context.Pipe(duplex=False)
        self._process = context.Process(target=_write, args=(transforms, buckets, end))
        self._process.start()
        end.close()  # the writer's is then the only one, and closes with it

    def is_over(self) -> bool:
        return self._connection is None or self._connection.poll()

    def outcome(self) -> Failure | tuple[Any, Listing]:
        """What the writer sends at its end."""
        if self._connection is None:
            return None, {}
        try:
            outcome = self._connection.recv()
        except EOFError:
            outcome = None
        self._process.join()
        if outcome is None:
            code = self._process.exitcode
            name = signal.Signals(-code).name if code < 0 else f"exit code {code}"
            return Failure(f"died ({name})")
        return outcome

    def finalise(self, results: Any) -> None:
        """Let Megatron write `.metadata` and `metadata.json`. Collective."""
        if self._connection is not None:
            self._results.put(results)
        for function in self._request.finalize_fns:
            function()


def _write(transforms: list, buckets: list, connection: Connection) -> None:
    """The writer process: all files of this rank, flushed; sends (results, listing), or Failure."""
    die_with_parent()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # a run that is stopped waits for its checkpoint
    try:
        connection.send(_write_buckets(transforms, buckets))
    except Exception as error:
        connection.send(Failure(f"failed ({error})", disk_reason(error)))


def _write_buckets(transforms: list, buckets: list) -> tuple[dict[int, Any], Listing]:
    results, listing = {}, {}
    for i, bucket in enumerate(buckets):
        done: queue.Queue = queue.Queue()
        count: queue.Queue = queue.Queue()
        count.put(i)
        filesystem_async.FileSystemWriterAsync.write_preloaded_data(
            transforms, i, bucket, done, count, use_fsync=True
        )
        results[i] = done.get()[1]
        if isinstance(results[i], Exception):
            raise results[i]
        file = Path(bucket[0])
        listing[file.name] = file.stat().st_size, digest(file)
    return results, listing


def digest(file: Path) -> str:
    """xxh3_64 of a file."""
    state = xxhash.xxh3_64()
    with file.open("rb") as stream:
        while block := stream.read(2**24):
            state.update(block)
    return state.hexdigest()
