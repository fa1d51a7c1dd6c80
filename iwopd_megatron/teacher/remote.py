"""Teachers behind HTTP as a `Scorer`: rank 0 asks their servers, every rank hears the scores."""

from __future__ import annotations

from concurrent.futures import FIRST_COMPLETED, wait

import numpy

from iwopd_megatron.batch.packing import Packer
from iwopd_megatron.batch.scores import Scores, Support, by_batch
from iwopd_megatron.batch.trajectory import Trajectory
from iwopd_megatron.runtime.background import Background
from iwopd_megatron.runtime.main_only import MainOnly
from iwopd_megatron.teacher.connection import TeacherConnection

POLL_SECONDS = 0.5  # how soon a server that is not restarted any more is noticed


class TeacherConnections:
    """Rank 0's connections to all teachers behind HTTP, and the loop that they live in."""

    def __init__(self, background: Background, by_source: dict[str, TeacherConnection]):
        """by_source: of the problems; '': any."""
        self.background, self.by_source = background, by_source
        self._found: dict[int, Scores] = {}  # by index, of the samples that were awaited last

    def connect(self) -> None:
        """Return when all servers are there and hold the right models."""
        for connection in self.by_source.values():
            connection.connect()

    def begin(self, sample: Trajectory, topk: int) -> None:
        """Start scoring one sample, unless that was begun already or no loss reads it."""
        if sample.loss_tokens:
            self._of(sample).begin(sample, topk)

    def count_scored(self, samples: list[Trajectory], topk: int) -> int:
        """Return how many of these were begun and are scored already."""
        return sum(self._of(sample).is_scored(sample, topk) for sample in samples)

    def await_logps(self, samples: list[Trajectory], topk: int) -> list[numpy.ndarray]:
        """Return fp32 log-probs `[T]` of these in order; what was not begun is begun.

        ServiceError as soon as a sample cannot be scored or a server is not restarted any more.
        """
        for sample in samples:
            self.begin(sample, topk)
        futures = [self._of(sample).take(sample, topk) for sample in samples]
        pending = set(futures)
        while pending:
            for connection in self.by_source.values():
                connection.check_alive()
            done, pending = wait(pending, POLL_SECONDS, FIRST_COMPLETED)
            for future in done:
                future.result()  # raises what went wrong at once
        found = [future.result() for future in futures]
        self._found = dict(zip((sample.index for sample in samples), found, strict=True))
        return [scores.logp for scores in found]

    def scores_of(self, sample: Trajectory) -> Scores:
        """Return all scores of a sample that was awaited last."""
        return self._found[sample.index]

    def _of(self, sample: Trajectory) -> TeacherConnection:
        return self.by_source[sample.source if sample.source in self.by_source else ""]

    def close(self) -> None:
        """Stop the services that were started, and the loop."""
        for connection in self.by_source.values():
            connection.close()
        self.background.close()


class RemoteScorer:
    """A `Scorer` that asks servers, one or several per source of the problems."""

    def __init__(self, connections: MainOnly[TeacherConnections], packer: Packer):
        """packer: the student's, whose micro-batches the supports are of."""
        self.connections, self.packer = connections, packer

    def connect(self) -> None:
        """Return when all servers are there and hold the right models. Collective."""
        self.connections.call(TeacherConnections.connect)

    def begin(self, sample: Trajectory, topk: int = 0) -> None:
        """Start scoring one sample, which `score_samples` awaits; nothing but on rank 0."""
        self.connections.tell(TeacherConnections.begin, sample, topk)

    def score_samples(
        self, samples: list[Trajectory], topk: int = 0
    ) -> tuple[list[list[float]], list[Support]]:
        """As the protocol says; log-probs of tokens no loss reads are 0. Collective.

        One broadcast of all log-probs; with `topk` another of K ids and log-probs for each sample.
        """
        wanted = [sample for sample in samples if sample.loss_tokens]
        found = self.connections.call(TeacherConnections.await_logps, wanted, topk)
        logps = dict(zip((sample.index for sample in wanted), found, strict=True))
        values = [_read_only(sample, logps.get(sample.index)) for sample in samples]
        return values, self._supports(wanted) if topk else []

    def count_scored(self, samples: list[Trajectory], topk: int = 0) -> int:
        """Return how many of these were begun and are scored already; 0 but on rank 0."""
        return self.connections.peek(0, TeacherConnections.count_scored, samples, topk)

    def _supports(self, samples: list[Trajectory]) -> list[Support]:
        """Return this rank's micro-batches'; every rank hears of all samples and keeps its own."""
        batches, _ = self.packer(samples)
        is_last = self.packer.parallel.is_last_stage
        owners = {int(i) for batch in batches if is_last for i in batch.owner.unique()}
        own = {}
        for sample in samples:
            scores = self.connections.call(TeacherConnections.scores_of, sample)
            if sample.index in owners:
                own[sample.index] = scores
        return by_batch(batches, own) if is_last else []

    def close(self) -> None:
        """Stop the services that were started."""
        self.connections.tell(TeacherConnections.close)


def _read_only(sample: Trajectory, logp: numpy.ndarray | None) -> list[float]:
    """Return 0 where no loss reads, as embedded models score."""
    if logp is None:
        return [0.0] * len(sample.response_ids)
    return numpy.where(sample.is_read, logp, numpy.float32(0)).tolist()
