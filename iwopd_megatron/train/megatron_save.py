"""What is used of Megatron's asynchronous save beyond its documentation: the only file that does.

As read in megatron-core 0.16.1, dist_checkpointing/strategies/filesystem_async.py and
async_utils.py:
- `_results_queue`: where `FileSystemWriterAsync.retrieve_write_results` looks for what was written.
  Its own would be a manager process, which imports everything again and takes seconds.
- `AsyncRequest`: `async_fn` is None where a rank has nothing to write, or else a partial whose
  first argument is the storage's transforms; `async_fn_args` are (rank, buckets, results queue);
  `preload_fn` returns the buckets with tensors copied to the host; `finalize_fns` write
  `.metadata` and `metadata.json`.
- A bucket is one file: (path, storage key, data). `write_preloaded_data` writes it, puts
  (number, results or exception) into one queue and takes its number from another.
"""

from __future__ import annotations

import queue
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from iwopd_megatron.runtime.megatron import dist_checkpointing, filesystem_async
from iwopd_megatron.weights.torch_dist.writer import METADATA

filesystem_async._results_queue = queue.Queue()

Results = dict[int, list[Any]]  # file number -> torch's WriteResult of every item


@dataclass(frozen=True)
class PlannedFiles:
    """The files that Megatron has planned for this rank, with their data on the host."""

    transforms: list[Any]
    buckets: list[Any]

    def write(self) -> Iterator[tuple[Path, list[Any]]]:
        """Write every file and flush it; yield its path and the results. Any process."""
        for i, bucket in enumerate(self.buckets):
            done: queue.Queue[tuple[int, Any]] = queue.Queue()
            count: queue.Queue[int] = queue.Queue()
            count.put(i)
            filesystem_async.FileSystemWriterAsync.write_preloaded_data(
                self.transforms, i, bucket, done, count, use_fsync=True
            )
            _, results = done.get()
            if isinstance(results, Exception):
                raise results
            yield Path(bucket[0]), results


class MegatronSave:
    """One checkpoint that Megatron plans and completes; the files between are written elsewhere."""

    def __init__(self, state: dict[str, Any], folder: Path):
        """Plan the files of every rank and write what is rank 0's alone. Collective."""
        self._request = dist_checkpointing.save(
            state, str(folder), content_metadata=METADATA, async_sharded_save=True
        )

    def files(self) -> PlannedFiles | None:
        """Return this rank's files, None where it has none to write. Once a save."""
        if self._request.async_fn is None:
            return None
        return PlannedFiles(self._request.async_fn.args[0], self._request.preload_fn())

    def finalise(self, results: Results) -> None:
        """Let Megatron write `.metadata` and `metadata.json`. Collective."""
        if self._request.async_fn is not None:
            _, _, own_queue = self._request.async_fn_args
            own_queue.put(results)
        for function in self._request.finalize_fns:
            function()
