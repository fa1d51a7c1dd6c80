"""Stream this world's student weights, whole and HF-named, to every rank, bucket by bucket.

Within a pipeline stage each bucket of shards is all-gathered (dense: over tp; experts: etp x ep),
then broadcast along pp. No rank ever holds more than one bucket beside its own shards.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import torch
import torch.distributed as dist

from iwopd_megatron.hf.config import HfConfig
from iwopd_megatron.runtime.parallel import Axis, Parallel
from iwopd_megatron.weights.table import Entry, entries

BUCKET_BYTES = 256 * 2**20
T = TypeVar("T")


class WeightStream:
    """The student's weights under HF names, from any layout. Every rank iterates together."""

    def __init__(self, chunks: list[torch.nn.Module], hf: HfConfig, parallel: Parallel):
        self.hf, self.parallel = hf, parallel
        own = [entry for chunk in chunks for entry in entries(chunk, hf) if not entry.is_copy]
        self.buckets: list[tuple[list[Entry], list[list[list[str]]]]] = []
        for is_expert in (False, True):
            part = [entry for entry in own if entry.is_expert == is_expert]
            limit = BUCKET_BYTES // self._axis(is_expert).size
            for bucket in buckets(part, lambda entry: entry.parameter, limit):
                names: list[list[list[str]]] = [None] * self._axis(
                    is_expert
                ).size  # per shard, per entry
                dist.all_gather_object(
                    names, [e.hf_names for e in bucket], group=self._axis(is_expert).group
                )
                self.buckets.append((bucket, names))
        self.counts = [0] * parallel.pp.size
        dist.all_gather_object(self.counts, len(self.buckets), group=parallel.pp.group)

    def _axis(self, is_expert: bool) -> Axis:
        return self.parallel.expert_model if is_expert else self.parallel.tp

    @torch.no_grad()
    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(Hugging Face name, whole tensor), the same sequence on every rank."""
        for stage, count in enumerate(self.counts):
            for i in range(count):
                own = self._gather(*self.buckets[i]) if stage == self.parallel.pp.rank else None
                yield from self._broadcast(own, stage).items()

    def _gather(self, bucket: list[Entry], names: list[list[list[str]]]) -> dict[str, torch.Tensor]:
        is_expert = bucket[0].is_expert
        axis = self._axis(is_expert)
        flat = torch.cat([entry.parameter.detach().flatten() for entry in bucket])
        shards = flat.new_empty(axis.size, flat.numel())
        dist.all_gather_into_tensor(shards.view(-1), flat, group=axis.group)
        per_model = (
            self.parallel.etp.size if is_expert else axis.size
        )  # shards that make up one tensor
        whole, start = {}, 0
        for i, entry in enumerate(bucket):
            shape = entry.parameter.shape
            parts = shards[:, start : start + shape.numel()].unflatten(1, shape).unbind()
            for first in range(0, axis.size, per_model):
                tensors = entry.cut.unshard(list(parts[first : first + per_model]), self.hf)
                whole.update(zip(names[first][i], tensors, strict=True))
            start += shape.numel()
        return whole

    def _broadcast(
        self, own: dict[str, torch.Tensor] | None, stage: int
    ) -> dict[str, torch.Tensor]:
        if self.parallel.pp.size == 1:
            return own
        group, source = self.parallel.pp.group, dist.get_global_rank(self.parallel.pp.group, stage)
        header = [[(name, t.shape, t.dtype) for name, t in own.items()] if own else None]
        dist.broadcast_object_list(header, source, group=group)
        dtype = header[0][0][2]
        device = next(iter(self.buckets[0][0])).parameter.device
        total = sum(shape.numel() for _, shape, _ in header[0])
        flat = (
            torch.cat([t.flatten() for t in own.values()])
            if own
            else torch.empty(total, dtype=dtype, device=device)
        )
        dist.broadcast(flat, source, group=group)
        parts = flat.split([shape.numel() for _, shape, _ in header[0]])
        return {
            name: part.view(shape) for part, (name, shape, _) in zip(parts, header[0], strict=True)
        }


def buckets(
    items: Iterable[T], tensor: Callable[[T], torch.Tensor], limit: int = BUCKET_BYTES
) -> Iterator[list[T]]:
    """Consecutive items whose tensors are of one dtype and at most `limit` bytes (at least one)."""
    run: list[T] = []
    size = 0
    for item in items:
        new = tensor(item)
        if run and (size + new.nbytes > limit or new.dtype != tensor(run[0]).dtype):
            yield run
            run, size = [], 0
        run.append(item)
        size += new.nbytes
    if run:
        yield run
