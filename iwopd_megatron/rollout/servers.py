"""The engine of rollout servers: generate through the pool, update through a push, prove it landed.

Every rank calls it; HTTP happens on rank 0, in an event loop beside Megatron's thread.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import torch

from iwopd_megatron.batch import gates
from iwopd_megatron.batch.trajectory import Trajectory
from iwopd_megatron.errors import GateError, ServiceError
from iwopd_megatron.hf import agreement as gates_start
from iwopd_megatron.hf.fingerprint import with_identity
from iwopd_megatron.rollout.engine import OnSample, Prompt, Sampling
from iwopd_megatron.rollout.pool import NoServer, Pool
from iwopd_megatron.rollout.proof import Fingerprints, check_landed
from iwopd_megatron.rollout.push import Push
from iwopd_megatron.rollout.server import ServerLost, ServerRefused
from iwopd_megatron.runtime.background import Background
from iwopd_megatron.runtime.keeper import Keeper
from iwopd_megatron.runtime.parallel import Parallel
from iwopd_megatron.weights.sync import buckets

ATTEMPTS = 3  # at one weight version, with the servers that are left or came back

Weights = Iterable[tuple[str, torch.Tensor]]


@dataclass
class Job:
    """One round's prompts on their way, on rank 0."""

    prompts: list[Prompt]
    sampling: Sampling
    on_sample: OnSample | None
    samples: dict[int, Trajectory] = field(default_factory=dict)
    future: Future | None = None

    def keep(self, sample: Trajectory) -> None:
        self.samples[sample.index] = sample
        if self.on_sample is not None:
            self.on_sample(sample)

    @property
    def missing(self) -> list[Prompt]:
        return [prompt for prompt in self.prompts if prompt.index not in self.samples]


@dataclass(frozen=True)
class Canary:
    """A prompt that servers must score as the trainer does, right after an update."""

    ids: list[int]
    probe: Callable[[], list[float]]  # the trainer's log-probs of ids[1:]; collective
    limit: float = 0.1  # mean difference, nats


class ServerEngine:
    """`RolloutEngine` on servers. `pool`, `push` and `loop` are None except on rank 0."""

    def __init__(
        self,
        parallel: Parallel,
        pool: Pool | None,
        push: Push | None,
        loop: Background | None,
        verify_every: int = 1,
        canary: Canary | None = None,
        keeper: Keeper | None = None,
    ):
        self.parallel, self.pool, self.push, self.loop = parallel, pool, push, loop
        self.verify_every, self.canary, self.keeper = verify_every, canary, keeper
        self.weights: Weights = []
        self.version = -1
        self.updates, self.proven = 0, -1  # proven: the last version whose checksums were compared
        self.job: Job | None = None

    def wait_ready(self, student: dict[str, Any] | None = None) -> None:
        """Start the servers that are ours, and return when all servers can generate.

        student: its `fingerprint.identity`; GateError if a server holds another model.
        """
        self.keeper.start()
        self.keeper.wait_ready()
        for place in self.pool.places:
            server = place.server
            try:
                self.loop.submit(place.wait_ready()).result()
                info = self.loop.submit(server.describe()).result()
            except (ServerLost, ServerRefused) as error:
                raise ServiceError(f"a rollout server is not there: {error}.") from None
            if student is not None:
                gates_start.served_student(server.url, with_identity(info), student)

    def close(self) -> None:
        """Leave the servers, and stop those that are ours."""
        if self.parallel.is_main:
            self.push.close()
            self.loop.close()
            self.keeper.stop()

    def prefetch(
        self, prompts: list[Prompt], sampling: Sampling, on_sample: OnSample | None = None
    ) -> None:
        """Start what the next `generate` asks for; it goes on under weights pushed meanwhile."""
        if self.parallel.is_main:
            self.job = self._start(Job(prompts, sampling, on_sample))

    def generate(
        self, prompts: list[Prompt], sampling: Sampling, on_sample: OnSample | None = None
    ) -> list[Trajectory]:
        job, self.job = self.job, None
        if self.parallel.is_main and (job is None or job.sampling != sampling):
            self.job = job  # an evaluation's prompts may come between
            job = self._start(Job(prompts, sampling, on_sample))
        while not self.parallel.on_main(lambda: self._is_complete(job)):
            self.update(self.weights, self.version)
            if self.parallel.is_main:
                self._start(job)
        return self.parallel.on_main(lambda: [job.samples[prompt.index] for prompt in prompts])

    def _start(self, job: Job) -> Job:
        job.future = self.loop.submit(self.pool.collect(job.missing, job.sampling, job.keep))
        return job

    def _is_complete(self, job: Job) -> bool:
        """Wait for it. False: no server holds the weights any more; push them and ask again."""
        try:
            job.future.result()
            return True
        except NoServer:
            self.loop.submit(self.pool.settle()).result()
            if not self.pool.live:
                raise ServiceError(
                    "no rollout server is left; the log names why each was lost. "
                    "Start them again and go on with --resume."
                ) from None
            return False

    def update(self, weights: Weights, version: int) -> None:
        """Send the weights to every server that lacks them, and prove that they landed."""
        self.weights, self.version = weights, version
        is_proof_due = self.updates % self.verify_every == 0
        for attempt in range(ATTEMPTS):
            if not self.parallel.on_main(lambda: self._begin(version, is_proof_due)):
                break
            failure = self._send(weights)
            is_last = attempt == ATTEMPTS - 1
            self.parallel.on_main(lambda f=failure, last=is_last: self._end(f, last))
        self.parallel.on_main(self._resume)
        if is_proof_due and self.canary is not None and len(self.canary.ids) > 1:
            found = self.parallel.on_main(self._score_canary)
            gates.canary(self.canary.probe(), found, self.canary.limit)
        self.updates += 1

    def _begin(self, version: int, is_proof_due: bool) -> int:
        """How many servers there are to update; they are paused."""
        places = self.loop.submit(self.pool.begin_update(version)).result()
        self.fingerprints: dict[int, Fingerprints] = {}  # by the servers' tensor-parallel size
        if places:
            if is_proof_due:
                self.fingerprints = {p.server.tp: p.server.fingerprints() for p in places}
            self.push.begin(places, version)
        return len(places)

    def _send(self, weights: Weights) -> Exception | None:
        """Every rank takes part in gathering; rank 0's trouble must not keep it from doing so."""
        failure = None
        for bucket in buckets(weights, lambda item: item[1]):
            if self.parallel.is_main and failure is None:
                try:
                    for prints in self.fingerprints.values():
                        for name, tensor in bucket:
                            prints.add(name, tensor)
                    self.push.send(bucket)
                except Exception as error:
                    failure = error
        return failure

    def _end(self, failure: Exception | None, is_last: bool) -> None:
        if failure is not None:
            raise failure
        for place in self.push.end():
            try:
                if self.fingerprints:
                    found = self.loop.submit(place.server.checksums()).result()
                    check_landed(place.server.url, self.fingerprints[place.server.tp].ranks, found)
                place.version = self.version
            except GateError as error:
                if is_last:
                    raise
                lost = self.pool.lose(place, str(error), is_dead=False)
                self.loop.submit(lost).result()
        if self.fingerprints:
            self.proven = self.version

    def _score_canary(self) -> dict[str, list[float]]:
        """By URL, from every server that holds the weights."""
        found = {}
        for place in self.pool.live:
            if place.version == self.version:
                try:
                    score = self.loop.submit(place.server.score(self.canary.ids))
                    found[place.server.url] = score.result()
                except ServerLost as error:
                    self.loop.submit(self.pool.lose(place, str(error))).result()
        return found

    def _resume(self) -> None:
        self.loop.submit(self.pool.end_update()).result()
        if not any(place.version == self.version for place in self.pool.live):
            raise ServiceError(
                f"no rollout server took weight version {self.version} in {ATTEMPTS} attempts; "
                "the log names why each was lost."
            )
