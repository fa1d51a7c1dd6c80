"""`iwopd serve-teacher`: the scoring server, a forward-only Megatron world behind SGLang's call.

Rank 0's main thread takes batches of requests from the queue that its HTTP thread fills, sends each
to all ranks, and all score it with Megatron's schedule. Idle ranks wait in that broadcast, which a
heartbeat keeps from running out of time.
"""

from __future__ import annotations

import os
import socket
import time
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import uvicorn
from transformers import AutoTokenizer

from iwopd_megatron.batch.packing import Packer
from iwopd_megatron.batch.scores import Scores, by_sample
from iwopd_megatron.batch.trajectory import Trajectory
from iwopd_megatron.config.models import Service, Teacher
from iwopd_megatron.errors import RecipeError
from iwopd_megatron.hf.config import read_hf_config, read_json
from iwopd_megatron.hf.fingerprint import identity
from iwopd_megatron.hf.flops import attention_cost
from iwopd_megatron.runtime.background import Background
from iwopd_megatron.runtime.main_only import Held, HeldElsewhere, MainOnly
from iwopd_megatron.runtime.parallel import Parallel, initialise, shutdown
from iwopd_megatron.runtime.stop import die_with_parent, stop_requested, watch_signals
from iwopd_megatron.teacher.embedded import EmbeddedScorer
from iwopd_megatron.teacher.scoring_api import ScoringHandlers, create_app
from iwopd_megatron.teacher.scoring_protocol import Limits
from iwopd_megatron.teacher.scoring_queue import ScoringJob, ScoringQueue

HEARTBEAT_SECONDS = 60.0  # between broadcasts of an idle service
POLL_SECONDS = 0.2  # how soon a signal is seen
GRACE_SECONDS = 30  # for clients to read their answers at the end


@dataclass(frozen=True)
class ScoringBatch:
    """The samples that every rank scores next, with the same settings; none: a heartbeat."""

    samples: list[Trajectory] = field(default_factory=list)
    topk: int = 0
    temperature: float = 1.0


def serve(teacher: Teacher, service: Service) -> None:
    """Serve the teacher until SIGTERM or Ctrl-C, and drain. Every rank of the service's world."""
    watch_signals()
    die_with_parent()
    # It listens before the ranks meet, so that /health says 503 meanwhile.
    listening = ScoringServer(service) if os.environ["RANK"] == "0" else None
    parallel = initialise(service.parallel)
    server: MainOnly[ScoringServer]
    server = HeldElsewhere(parallel) if listening is None else Held(parallel, listening)
    scorer = ServiceScorer(teacher, service, parallel)
    server.tell(ScoringServer.open, scorer)
    while (batch := server.call(ScoringServer.next_batch)) is not None:
        if batch.samples:
            server.tell(ScoringServer.answer, scorer.score_batch(batch))
    server.tell(ScoringServer.close)
    shutdown()


class ServiceScorer:
    """The model of a scoring server, and how a batch goes through it; every rank has one."""

    def __init__(self, teacher: Teacher, service: Service, parallel: Parallel):
        """Load the teacher's model. Collective."""
        self.teacher, self.service, self.parallel = teacher, service, parallel
        self.hf = read_hf_config(teacher.hf)
        packer = Packer(parallel, service.microbatch_tokens, attention_cost(self.hf))
        self.scorer = EmbeddedScorer(teacher, packer, temperature=1.0)

    @property
    def batch_tokens(self) -> int:
        """Tokens of a full batch: a micro-batch for every data-parallel rank and every stage."""
        return self.service.microbatch_tokens * self.parallel.dp.size * self.parallel.pp.size

    def limits(self) -> Limits:
        """Return the bounds of what this layout scores."""
        layout = self.service.parallel
        fits = self.service.microbatch_tokens // layout.token_multiple * layout.token_multiple + 1
        longest = min(fits, self.hf.context_length)
        return Limits(self.hf.vocab_size, longest, self.service.max_queue_tokens)

    def model_info(self) -> dict[str, Any]:
        """Return SGLang's keys, and what a trainer compares before it trusts the scores."""
        folder = str(self.teacher.hf.resolve())
        return {
            "model_path": folder,
            "tokenizer_path": folder,
            "is_generation": False,
            "weight_version": "default",
            "model_type": self.hf.model_type,
            "architectures": read_json(self.teacher.hf, "config.json").get("architectures"),
            "dtype": self.teacher.dtype,
            "layout": self.service.parallel.axes | self.service.parallel.placement,
            "max_sequence_tokens": self.limits().max_tokens,
            "has_logprob_temperature": True,
            **identity(self.teacher.hf, AutoTokenizer.from_pretrained(folder)),
        }

    def score_batch(self, batch: ScoringBatch) -> list[Scores]:
        """Return scores in the order of the samples, on every rank. Collective."""
        if self.service.deterministic:
            return [self._score([sample], batch)[0] for sample in batch.samples]
        return self._score(batch.samples, batch)

    def _score(self, samples: list[Trajectory], batch: ScoringBatch) -> list[Scores]:
        packer = self.scorer.packer
        schedule = replace(self.scorer.schedule, temperature=batch.temperature)
        values, supports = schedule.score(samples, packer, batch.topk)
        logps = [torch.tensor(own, dtype=torch.float32).numpy() for own in values]
        if not batch.topk:
            return [Scores(logp) for logp in logps]
        batches, _ = packer(samples)
        tables = by_sample(samples, batches, supports, batch.topk, self.parallel)
        return [Scores(logp, *table) for logp, table in zip(logps, tables, strict=True)]


class ScoringServer:
    """Rank 0's side of the service: the HTTP server in its thread, and the batch in hand."""

    def __init__(self, service: Service):
        """Listen at once, so that /health says 503 while the model is loaded.

        RecipeError if the port is taken.
        """
        self.service = service
        self.socket = _listen(service.host, service.port)
        self.handlers = ScoringHandlers(ScoringQueue(service.max_queue_tokens), stop_requested)
        self.batch_tokens = 0
        self._jobs: list[ScoringJob] = []
        config = uvicorn.Config(
            create_app(self.handlers),
            log_level="warning",
            access_log=False,
            lifespan="off",
            timeout_keep_alive=300,  # longer than clients keep a connection, so they close it
            timeout_graceful_shutdown=GRACE_SECONDS,
        )
        self.server, self.background = uvicorn.Server(config), Background("http")
        self._serving = self.background.submit(self.server.serve(sockets=[self.socket]))

    @property
    def url(self) -> str:
        """Where it listens."""
        host, port = self.socket.getsockname()[:2]
        return f"http://{host}:{port}"

    def open(self, scorer: ServiceScorer) -> None:
        """Take requests from now on, for this model."""
        info = scorer.model_info()
        self.batch_tokens, self.handlers.limits = scorer.batch_tokens, scorer.limits()
        self.handlers.model_info = info
        print(f"teacher {info['model_path']} is served at {self.url}", flush=True)

    def next_batch(self) -> ScoringBatch | None:
        """Return the next batch, an empty one as a heartbeat; None once all is drained."""
        queue, end = self.handlers.queue, time.monotonic() + HEARTBEAT_SECONDS
        while time.monotonic() < end:
            if stop_requested():
                queue.close()
            self._jobs = queue.take(self.batch_tokens, POLL_SECONDS, self.service.batch_ms / 1000)
            if self._jobs:
                samples = [
                    Trajectory(i, job.ids[: job.start + 1], job.ids[job.start + 1 :])
                    for i, job in enumerate(self._jobs)
                ]
                return ScoringBatch(samples, *self._jobs[0].kind)
            if queue.is_closed and queue.is_empty:
                return None
        return ScoringBatch()

    def answer(self, scores: list[Scores]) -> None:
        """Answer the requests of the batch in hand, in its order."""
        for job, own in zip(self._jobs, scores, strict=True):
            job.future.set_result(own)
        self._jobs = []

    def close(self) -> None:
        """End the HTTP server once clients have their answers."""
        self.server.should_exit = True
        self._serving.result()
        self.background.close()


def _listen(host: str, port: int) -> socket.socket:
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        raise RecipeError(
            f"cannot listen on {host} port {port}: {error.strerror}; choose another with --port."
        ) from None
    return listener
