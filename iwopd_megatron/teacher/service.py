"""`iwopd serve-teacher`: a forward-only Megatron world behind SGLang's scoring call.

Rank 0's main thread takes batches of requests from the queue that its HTTP thread fills, sends each
to all ranks, and all score it with Megatron's schedule. Idle ranks wait in that broadcast, which a
heartbeat keeps from running out of time.
"""

from __future__ import annotations

import os
import socket
import time
from dataclasses import dataclass, field, replace

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
from iwopd_megatron.runtime.parallel import Parallel, initialise, shutdown
from iwopd_megatron.runtime.stop import die_with_parent, stop_requested, watch_signals
from iwopd_megatron.teacher.embedded import EmbeddedScorer
from iwopd_megatron.teacher.scoring_api import Front, create_app
from iwopd_megatron.teacher.scoring_protocol import Limits
from iwopd_megatron.teacher.scoring_queue import Job, ScoringQueue

HEARTBEAT_SECONDS = 60.0  # between broadcasts of an idle service
POLL_SECONDS = 0.2  # how soon a signal is seen
GRACE_SECONDS = 30  # for clients to read their answers at the end


@dataclass(frozen=True)
class Work:
    """What every rank does next: score these, all alike; nothing if there are none."""

    samples: list[Trajectory] = field(default_factory=list)
    topk: int = 0
    temperature: float = 1.0


def serve(teacher: Teacher, service: Service) -> None:
    """Every rank of the service's world; returns when drained after SIGTERM or Ctrl-C."""
    watch_signals()
    die_with_parent()
    desk = Desk(service) if os.environ["RANK"] == "0" else None
    parallel = initialise(service.parallel)
    scorer = ServiceScorer(teacher, service, parallel)
    if desk is not None:
        desk.open(scorer.model_info(), scorer.limits(), scorer.batch_tokens)
    while (work := parallel.on_main(lambda: desk.next_work())) is not None:
        if work.samples:
            scores = scorer.score(work)
            if desk is not None:
                desk.answer(scores)
    if desk is not None:
        desk.close()
    shutdown()


class ServiceScorer:
    """The model, and how a batch of requests goes through it. Collective over the world."""

    def __init__(self, teacher: Teacher, service: Service, parallel: Parallel):
        self.teacher, self.service, self.parallel = teacher, service, parallel
        self.hf = read_hf_config(teacher.hf)
        packer = Packer(parallel, service.microbatch_tokens, attention_cost(self.hf))
        self.scorer = EmbeddedScorer(teacher, packer, temperature=1.0)

    @property
    def batch_tokens(self) -> int:
        """A micro-batch for every data-parallel rank and, to fill the pipeline, every stage."""
        return self.service.microbatch_tokens * self.parallel.dp.size * self.parallel.pp.size

    def limits(self) -> Limits:
        layout = self.service.parallel
        fits = self.service.microbatch_tokens // layout.token_multiple * layout.token_multiple + 1
        longest = min(fits, self.hf.context_length)
        return Limits(self.hf.vocab_size, longest, self.service.max_queue_tokens)

    def model_info(self) -> dict:
        """SGLang's keys, and what a trainer must compare before it trusts the scores."""
        folder = str(self.teacher.hf.resolve())
        return {
            "model_path": folder,
            "tokenizer_path": folder,
            "is_generation": False,
            "weight_version": "default",
            "model_type": self.hf.model_type,
            "architectures": read_json(self.teacher.hf, "config.json").get("architectures"),
            "dtype": self.teacher.dtype,
            "layout": self.service.parallel.model_dump(),
            "max_sequence_tokens": self.limits().max_tokens,
            "has_logprob_temperature": True,
            **identity(self.teacher.hf, AutoTokenizer.from_pretrained(folder)),
        }

    def score(self, work: Work) -> list[Scores]:
        """In the order of the samples, on every rank."""
        if self.service.deterministic:
            return [self._score([sample], work)[0] for sample in work.samples]
        return self._score(work.samples, work)

    def _score(self, samples: list[Trajectory], work: Work) -> list[Scores]:
        packer = self.scorer.packer
        schedule = replace(self.scorer.schedule, temperature=work.temperature)
        values, supports = schedule.score(samples, packer, work.topk)
        logps = [torch.tensor(own, dtype=torch.float32).numpy() for own in values]
        if not work.topk:
            return [Scores(logp) for logp in logps]
        batches, _ = packer(samples)
        tables = by_sample(samples, batches, supports, work.topk, self.parallel)
        return [Scores(logp, *table) for logp, table in zip(logps, tables, strict=True)]


class Desk:
    """Rank 0's side of the work: the HTTP server in its thread, and the batch in hand."""

    def __init__(self, service: Service):
        """Listens at once, so that /health says 503 while the model is loaded."""
        self.service = service
        self.socket = _listen(service.host, service.port)
        self.front = Front(ScoringQueue(service.max_queue_tokens), stop_requested)
        self.batch_tokens = 0
        self._jobs: list[Job] = []
        config = uvicorn.Config(
            create_app(self.front),
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
        host, port = self.socket.getsockname()[:2]
        return f"http://{host}:{port}"

    def open(self, model_info: dict, limits: Limits, batch_tokens: int) -> None:
        """Take requests from now on."""
        self.batch_tokens, self.front.limits = batch_tokens, limits
        self.front.model_info = model_info
        print(f"teacher {model_info['model_path']} is served at {self.url}", flush=True)

    def next_work(self) -> Work | None:
        """The next batch; an empty one as a heartbeat; None when stopped and all is answered."""
        queue, end = self.front.queue, time.monotonic() + HEARTBEAT_SECONDS
        while time.monotonic() < end:
            if stop_requested():
                queue.close()
            self._jobs = queue.take(self.batch_tokens, POLL_SECONDS, self.service.batch_ms / 1000)
            if self._jobs:
                samples = [
                    Trajectory(i, job.ids[: job.start + 1], job.ids[job.start + 1 :])
                    for i, job in enumerate(self._jobs)
                ]
                return Work(samples, *self._jobs[0].kind)
            if queue.is_closed and queue.is_empty:
                return None
        return Work()

    def answer(self, scores: list[Scores]) -> None:
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
