"""New weights on their way to the rollout servers: the student's stream, as every rank has it.

What ranks tell one another of it are names and shapes, which depend on all of them: those that are
rehearsed hear what the others said before.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Iterator

import torch

from iwopd_megatron.config.recipe import Recipe
from iwopd_megatron.models.gpt import build_model
from iwopd_megatron.rehearsal.collectives import Mailbox, NotSaidYet, Recorder
from iwopd_megatron.rehearsal.job import Job
from iwopd_megatron.rehearsal.memoryless import Shapes
from iwopd_megatron.rehearsal.world import alone
from iwopd_megatron.rollout.broadcast import as_bytes
from iwopd_megatron.runtime import device
from iwopd_megatron.weights.sync import WeightStream, named_buckets

LOAD, PUSH = "load", "push"  # phases


def pushed(
    stream: WeightStream, recipe: Recipe, is_main: bool
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield what a rank is given in an update, in the pieces that rollout/servers.py makes of it.

    The main rank makes one run of bytes of a bucket where it broadcasts; the embedded engine copies
    one tensor after the other.
    """
    if recipe.rollout.engine == "hf":
        yield from stream
        return
    for bucket in named_buckets(stream):
        if is_main and recipe.rollout.sync == "distributed":
            as_bytes(bucket)
        yield from bucket


def introduce(job: Job, mailbox: Mailbox) -> None:
    """Have ranks say what they hold, and every stage what it sends, for those that come later.

    Of every stage the ranks that share its experts; what a tensor is called in a stage is the same
    on all others.
    """
    stage = job.world // job.layout.pp
    firsts = [stage * pp for pp in range(job.layout.pp)]
    experts = job.layout.ep * job.layout.etp
    if experts == job.layout.pp == 1:
        return
    for first in firsts:
        for rank in range(first, first + experts):
            with _streaming(job, rank, mailbox):
                pass
    if job.layout.pp > 1:
        for rank in firsts:
            with _streaming(job, rank, mailbox) as stream, contextlib.suppress(NotSaidYet):
                deque(stream, maxlen=0)


@contextlib.contextmanager
def _streaming(job: Job, rank: int, mailbox: Mailbox) -> Iterator[WeightStream]:
    recorder = Recorder(is_alone=True, mailbox=mailbox)
    with alone(rank, job.world, job.layout) as parallel, device.as_gpu(), Shapes([], recorder):
        recorder.phase = LOAD
        stream = WeightStream(build_model(job.hf, parallel, job.model.dtype), job.hf, parallel)
        recorder.phase = PUSH
        yield stream
