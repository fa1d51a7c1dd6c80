"""Rank 0's control of the rollout servers: starts them, has them answer, and updates their weights.

`servers.py` says when. HTTP runs in an event loop beside the thread that runs Megatron.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import torch

from iwopd_megatron.batch.trajectory import Trajectory
from iwopd_megatron.errors import GateError, ServiceError
from iwopd_megatron.hf import agreement
from iwopd_megatron.hf.fingerprint import with_identity
from iwopd_megatron.rollout.engine import OnSample, Prompt, Sampling
from iwopd_megatron.rollout.pool import NoServer, ServerPool
from iwopd_megatron.rollout.proof import Fingerprints, check_landed
from iwopd_megatron.rollout.push import Push, Targets
from iwopd_megatron.rollout.retry import collect
from iwopd_megatron.rollout.server import ServerLost, ServerRefused
from iwopd_megatron.runtime.background import Background
from iwopd_megatron.runtime.keeper import Keeper


@dataclass(eq=False)
class PendingAnswers:
    """The prompts of one round, and on rank 0 the answers that have come."""

    prompts: list[Prompt]
    sampling: Sampling
    on_sample: OnSample | None
    samples: dict[int, Trajectory] = field(default_factory=dict)

    def keep(self, sample: Trajectory) -> None:
        """Take an answer in, and tell `on_sample`."""
        self.samples[sample.index] = sample
        if self.on_sample is not None:
            self.on_sample(sample)

    @property
    def missing(self) -> list[Prompt]:
        """The prompts without an answer."""
        return [prompt for prompt in self.prompts if prompt.index not in self.samples]


class ServerController:
    """What rank 0 does with the rollout servers; other ranks hear of it through `MainOnly`."""

    def __init__(
        self,
        loop: Background,
        pool: ServerPool,
        push: Push,
        keeper: Keeper,
        student: dict[str, Any] | None = None,
    ):
        """loop: where the pool lives; keeper: of the servers that are ours.

        student: its `fingerprint.identity`, which servers must have; None: whatever they hold.
        """
        self.loop, self.pool, self.push, self.keeper = loop, pool, push, keeper
        self.student = student
        self.proven = -1  # the last version whose checksums were compared
        self.fingerprints: dict[int, Fingerprints] = {}  # by the servers' tensor-parallel size
        self.send_error: Exception | None = None  # of the update that is being sent
        self.running: dict[PendingAnswers, Future[None]] = {}

    def wait_ready(self) -> None:
        """Start the servers that are ours, and return when all servers can generate.

        ServiceError if one is not there in time; GateError if one holds another model.
        """
        self.keeper.start()
        self.keeper.wait_ready()
        for replica in self.pool.replicas:
            server = replica.server
            try:
                self.loop.submit(replica.wait_ready()).result()
                info = self.loop.submit(server.describe()).result()
            except (ServerLost, ServerRefused) as error:
                raise ServiceError(f"a rollout server is not there: {error}.") from None
            if self.student is not None:
                agreement.served_student(server.url, with_identity(info), self.student)

    def close(self) -> None:
        """Leave the servers, and stop those that are ours; no-op when repeated."""
        self.push.close()
        self.loop.close()
        self.keeper.stop()

    def start(self, pending: PendingAnswers) -> None:
        """Ask for the answers that are missing, and return at once."""
        asking = collect(self.pool, pending.missing, pending.sampling, pending.keep)
        self.running[pending] = self.loop.submit(asking)

    def is_complete(self, pending: PendingAnswers) -> bool:
        """Wait for what was started, and return whether all answers are there.

        False: no server holds the weights any more; push them and start it again. ServiceError if
        no server is left.
        """
        try:
            self.running.pop(pending).result()
            return True
        except NoServer:
            self.loop.submit(self.pool.settle()).result()
            if not self.pool.live:
                raise ServiceError(
                    "no rollout server is left; the log names why each was lost. "
                    "Start them again and go on with --resume."
                ) from None
            return False

    def answers(self, pending: PendingAnswers, prompts: list[Prompt]) -> list[Trajectory]:
        """Return the answers to these of its prompts, in order."""
        return [pending.samples[prompt.index] for prompt in prompts]

    def begin_update(self, version: int, is_proof_due: bool) -> int:
        """Pause the servers that lack this version, and return how many there are.

        is_proof_due: compare checksums at the end.
        """
        replicas = self.loop.submit(self.pool.begin_update(version)).result()
        self.fingerprints, self.send_error = {}, None
        if replicas:
            if is_proof_due:
                self.fingerprints = {r.server.tp: r.server.fingerprints() for r in replicas}
            self.push.begin(Targets(self.loop, self.pool, replicas), version)
        return len(replicas)

    def send(self, bucket: Sequence[tuple[str, torch.Tensor]]) -> None:
        """Send some of the weights.

        An error is kept for `end_update`: the other ranks wait for this one in the next bucket.
        """
        if self.send_error is not None:
            return
        try:
            for prints in self.fingerprints.values():
                for name, tensor in bucket:
                    prints.add(name, tensor)
            self.push.send(bucket)
        except Exception as error:
            self.send_error = error

    def end_update(self, version: int, is_last: bool) -> None:
        """Have the servers use the weights, and compare checksums where that is due.

        A server that does not hold them is lost; with `is_last`, there being no further attempt,
        that is a GateError.
        """
        if self.send_error is not None:
            raise self.send_error
        for replica in self.push.end():
            try:
                if self.fingerprints:
                    server = replica.server
                    found = self.loop.submit(server.checksums()).result()
                    check_landed(server.url, self.fingerprints[server.tp].ranks, found)
                replica.version = version
            except GateError as error:
                if is_last:
                    raise
                lost = self.pool.lose(replica, str(error), is_dead=False)
                self.loop.submit(lost).result()
        if self.fingerprints:
            self.proven = version

    def resume(self, version: int, attempts: int) -> None:
        """Let all servers go on; ServiceError if none took the weights in so many attempts."""
        self.loop.submit(self.pool.end_update()).result()
        if not any(replica.version == version for replica in self.pool.live):
            raise ServiceError(
                f"no rollout server took weight version {version} in {attempts} attempts; "
                "the log names why each was lost."
            )

    def score_canary(self, ids: list[int], version: int) -> dict[str, list[float]]:
        """Return the log-probs of ids[1:] by URL, from every server that holds the weights."""
        found = {}
        for replica in self.pool.live:
            if replica.version == version:
                try:
                    asking = self.loop.submit(replica.server.prompt_logps(ids))
                    found[replica.server.url] = asking.result()
                except ServerLost as error:
                    self.loop.submit(self.pool.lose(replica, str(error))).result()
        return found
