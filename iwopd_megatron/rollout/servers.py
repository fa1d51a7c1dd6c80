"""The engine of rollout servers, on every rank: the order in which all ranks take their steps.

Every rank gathers the weights and hears of the answers; what is done with the servers is done on
rank 0 (`controller.py`). An update is tried again for servers that failed: `ATTEMPTS`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from iwopd_megatron.batch import gates
from iwopd_megatron.batch.trajectory import Trajectory
from iwopd_megatron.rollout.controller import PendingAnswers, ServerController
from iwopd_megatron.rollout.engine import OnSample, Prompt, Sampling, Weights
from iwopd_megatron.runtime.main_only import MainOnly
from iwopd_megatron.weights.sync import named_buckets

ATTEMPTS = 3  # at one weight version, with the servers that are left or came back


@dataclass(frozen=True)
class Canary:
    """A prompt that servers must score as the trainer does, right after an update."""

    ids: list[int]
    probe: Callable[[], list[float]]  # the trainer's log-probs of ids[1:]; collective
    limit: float = 0.1  # mean difference, nats


class ServerEngine:
    """A `RolloutEngine` on servers, the same code on every rank."""

    def __init__(
        self,
        servers: MainOnly[ServerController],
        verify_every: int = 1,
        canary: Canary | None = None,
    ):
        """verify_every: updates between proofs that the weights landed; the first is proven."""
        self.servers, self.verify_every, self.canary = servers, verify_every, canary
        self.weights: Weights = []
        self.version = -1
        self.updates = 0
        self.ahead: PendingAnswers | None = None  # started by `prefetch`

    def wait_ready(self) -> None:
        """Return when all servers can generate. Collective."""
        self.servers.call(ServerController.wait_ready)

    def close(self) -> None:
        """Leave the servers, and stop those that are ours."""
        self.servers.tell(ServerController.close)

    def prefetch(
        self, prompts: list[Prompt], sampling: Sampling, on_sample: OnSample | None = None
    ) -> None:
        """Start what the next `generate` asks for; it goes on under weights pushed meanwhile."""
        self.ahead = self._started(prompts, sampling, on_sample)

    def _started(
        self, prompts: list[Prompt], sampling: Sampling, on_sample: OnSample | None
    ) -> PendingAnswers:
        pending = PendingAnswers(prompts, sampling, on_sample)
        self.servers.tell(ServerController.start, pending)
        return pending

    def generate(
        self, prompts: list[Prompt], sampling: Sampling, on_sample: OnSample | None = None
    ) -> list[Trajectory]:
        """As the protocol says; pushes the weights again where no server holds them any more."""
        ahead, self.ahead = self.ahead, None
        if ahead is not None and ahead.sampling == sampling:
            pending = ahead
        else:
            self.ahead = ahead  # an evaluation's prompts may come between
            pending = self._started(prompts, sampling, on_sample)
        while not self.servers.call(ServerController.is_complete, pending):
            self.update(self.weights, self.version)
            self.servers.tell(ServerController.start, pending)
        return self.servers.call(ServerController.answers, pending, prompts)

    def update(self, weights: Weights, version: int) -> None:
        """Send the weights to every server that lacks them, and prove that they landed."""
        self.weights, self.version = weights, version
        is_proof_due = self.updates % self.verify_every == 0
        for attempt in range(1, ATTEMPTS + 1):
            if not self.servers.call(ServerController.begin_update, version, is_proof_due):
                break
            for bucket in named_buckets(weights):  # gathered by all ranks
                self.servers.tell(ServerController.send, bucket)
            self.servers.call(ServerController.end_update, version, attempt == ATTEMPTS)
        self.servers.call(ServerController.resume, version, ATTEMPTS)
        if is_proof_due and self.canary is not None and len(self.canary.ids) > 1:
            found = self.servers.call(ServerController.score_canary, self.canary.ids, version)
            gates.canary(self.canary.probe(), found, self.canary.limit)
        self.updates += 1
