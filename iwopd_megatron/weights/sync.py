"""Stream this world's student weights, whole and HF-named, to every rank, bucket by bucket.

Within a pipeline stage each bucket of shards is all-gathered (dense: over tp; experts: etp x ep),
then broadcast along pp. No rank ever holds more than one bucket beside its own shards.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

import torch
import torch.distributed as dist

from iwopd_megatron.hf.config import HfConfig
from iwopd_megatron.runtime import device
from iwopd_megatron.weights.table import MappedParameter, mapped_parameters, weights_of

if TYPE_CHECKING:
    from iwopd_megatron.runtime.megatron import GPTModel
    from iwopd_megatron.runtime.parallel import Axis, Parallel

BUCKET_BYTES = 256 * 2**20
FUSED_WITH_LAST = ".kv_a_proj_with_mqa.weight"  # SGLang makes one tensor of it and q_a_proj
T = TypeVar("T")
Header: TypeAlias = list[tuple[str, torch.Size, torch.dtype]]  # a bucket's tensors, of one dtype


@dataclass(frozen=True)
class _Bucket:
    """Parameters of this rank that are gathered together, and the names of all ranks' parts."""

    parameters: list[MappedParameter]
    axis: Axis  # over which their shards are gathered
    shards: int  # that make up one tensor
    names: list[list[list[str]]]  # Hugging Face names by rank of `axis` and parameter

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return self.parameters[0].parameter.device


class WeightStream:
    """The student's weights under HF names, from any layout. Every rank iterates together."""

    def __init__(self, chunks: list[GPTModel], hf: HfConfig, parallel: Parallel):
        """Collective: every rank learns the others' names and number of buckets."""
        self.hf, self.parallel, self.chunks = hf, parallel, chunks
        mapped = [x for chunk in chunks for x in mapped_parameters(chunk, hf) if not x.is_copy]
        dense = sorted((x for x in mapped if not x.is_expert), key=lambda x: not x.is_trained)
        experts = [x for x in mapped if x.is_expert]
        self.buckets = self._buckets(dense, parallel.tp, parallel.tp.size)
        self.buckets += self._buckets(experts, parallel.expert_model, parallel.etp.size)
        self.counts = [0] * parallel.pp.size  # buckets of every pipeline stage
        dist.all_gather_object(self.counts, len(self.buckets), group=parallel.pp.group)

    @property
    def in_place(self) -> dict[str, torch.Tensor] | None:
        """The parameters by Megatron's names, where they lie; None unless all are whole here.

        None on a GPU too, where TransformerEngine's modules may hold them otherwise.
        """
        axes = self.parallel.tp, self.parallel.pp, self.parallel.expert_model
        if device.has_gpu() or any(axis.size > 1 for axis in axes):
            return None
        return {
            name: one.detach() for chunk in self.chunks for name, one in weights_of(chunk).items()
        }

    @staticmethod
    def _buckets(mapped: list[MappedParameter], axis: Axis, shards: int) -> list[_Bucket]:
        found = []
        for run in buckets(mapped, lambda x: x.parameter, BUCKET_BYTES // axis.size):
            names: list[list[list[str]]] = [[] for _ in range(axis.size)]
            dist.all_gather_object(names, [x.hf_names for x in run], group=axis.group)
            found.append(_Bucket(run, axis, shards, names))
        return found

    @torch.no_grad()
    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield (Hugging Face name, whole tensor), the same sequence on every rank."""
        for stage, count in enumerate(self.counts):
            for i in range(count):
                if self.parallel.pp.size == 1:
                    whole = self._gather(self.buckets[i])
                elif stage == self.parallel.pp.rank:
                    whole = self._send(self._gather(self.buckets[i]))
                else:
                    whole = self._receive(stage)
                yield from whole.items()

    def _gather(self, bucket: _Bucket) -> dict[str, torch.Tensor]:
        """Return a bucket's whole tensors from the shards of all ranks of its axis."""
        size = bucket.axis.size
        if size == 1:
            return self._whole(bucket)
        flat = torch.cat([x.parameter.detach().flatten() for x in bucket.parameters])
        shards = flat.new_empty(size, flat.numel())
        dist.all_gather_into_tensor(shards.view(-1), flat, group=bucket.axis.group)
        whole: dict[str, torch.Tensor] = {}
        start = 0
        for i, mapped in enumerate(bucket.parameters):
            shape = mapped.parameter.shape
            parts = shards[:, start : start + shape.numel()].unflatten(1, shape).unbind()
            for first in range(0, size, bucket.shards):
                own = parts[first : first + bucket.shards]
                tensors = mapped.sharding.unshard(own, self.hf)
                whole.update(zip(bucket.names[first][i], tensors, strict=True))
            start += shape.numel()
        return whole

    def _whole(self, bucket: _Bucket) -> dict[str, torch.Tensor]:
        """Return the same where this rank's shards are the whole tensors: views where it can."""
        whole: dict[str, torch.Tensor] = {}
        for mapped in bucket.parameters:
            tensors = mapped.sharding.unshard([mapped.parameter.detach()], self.hf)
            whole.update(zip(mapped.hf_names, tensors, strict=True))
        return whole

    def _send(self, whole: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Broadcast a bucket of this stage to the others; return it as they get it."""
        pp = self.parallel.pp
        source = dist.get_global_rank(pp.group, pp.rank)
        header: Header = [(name, tensor.shape, tensor.dtype) for name, tensor in whole.items()]
        dist.broadcast_object_list([header], source, group=pp.group)
        flat = torch.cat([tensor.flatten() for tensor in whole.values()])
        dist.broadcast(flat, source, group=pp.group)
        return _split(flat, header)

    def _receive(self, stage: int) -> dict[str, torch.Tensor]:
        """Return the bucket that another stage sends."""
        group = self.parallel.pp.group
        source = dist.get_global_rank(group, stage)
        received: list[Any] = [None]
        dist.broadcast_object_list(received, source, group=group)
        header: Header = received[0]
        numel = sum(shape.numel() for _, shape, _ in header)
        flat = torch.empty(numel, dtype=header[0][2], device=self.buckets[0].device)
        dist.broadcast(flat, source, group=group)
        return _split(flat, header)


def _split(flat: torch.Tensor, header: Header) -> dict[str, torch.Tensor]:
    parts = flat.split([shape.numel() for _, shape, _ in header])
    named = zip(header, parts, strict=True)
    return {name: part.view(shape) for (name, shape, _), part in named}


def buckets(
    items: Iterable[T],
    tensor: Callable[[T], torch.Tensor],
    limit: int = BUCKET_BYTES,
    stays: Callable[[T], bool] = lambda item: False,
) -> Iterator[list[T]]:
    """Yield runs of items whose tensors have one dtype and at most `limit` bytes, or one item.

    An item that `stays` is in the run of the one before it, whatever the bytes.
    """
    run: list[T] = []
    size = 0
    for item in items:
        new = tensor(item)
        is_full = size + new.nbytes > limit and not stays(item)
        if run and (is_full or new.dtype != tensor(run[0]).dtype):
            yield run
            run, size = [], 0
        run.append(item)
        size += new.nbytes
    if run:
        yield run


def named_buckets(
    weights: Iterable[tuple[str, torch.Tensor]],
) -> Iterator[list[tuple[str, torch.Tensor]]]:
    """Yield runs of named tensors, as a server may be sent them: what it makes one of together."""

    def is_fused(item: tuple[str, torch.Tensor]) -> bool:
        return item[0].endswith(FUSED_WITH_LAST)

    return buckets(weights, lambda item: item[1], BUCKET_BYTES, is_fused)
