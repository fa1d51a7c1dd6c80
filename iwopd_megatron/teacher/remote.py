"""Teachers behind HTTP, with the surface of an embedded one: rank 0 asks, every rank knows."""

from __future__ import annotations

import sys
from concurrent.futures import FIRST_COMPLETED, Future, wait
from typing import Any

import numpy
import yaml
from transformers import AutoTokenizer

from iwopd_megatron.batch.packing import Packer
from iwopd_megatron.batch.scores import Scores, Support, by_batch
from iwopd_megatron.batch.trajectory import Trajectory
from iwopd_megatron.config.models import Teacher
from iwopd_megatron.config.recipe import Recipe
from iwopd_megatron.hf import agreement as gates_start
from iwopd_megatron.hf.fingerprint import identity, with_identity
from iwopd_megatron.runtime import device
from iwopd_megatron.runtime.background import Background
from iwopd_megatron.runtime.keeper import Keeper
from iwopd_megatron.runtime.services import Server, free_port, outer_environment
from iwopd_megatron.teacher.retry import ScoringClient

POLL_SECONDS = 0.5  # how soon a server that is not restarted any more is noticed


class RemoteScorer:
    """Scores response tokens by asking servers, one or several per source of the problems.

    lines: rank 0's, by source ('': any); None on the other ranks.
    """

    def __init__(self, lines: dict[str, Line] | None, packer: Packer):
        self.lines, self.packer = lines, packer

    def connect(self) -> None:
        """Return when all servers are there and hold the right models. Collective."""
        self.packer.parallel.on_main(lambda: [line.connect() for line in self.lines.values()])

    def begin(self, sample: Trajectory, topk: int = 0) -> None:
        """Start scoring one sample; `score` awaits it. Rank 0 only."""
        if sample.loss_tokens:
            self._line(sample).begin(sample, topk)

    def score(
        self, samples: list[Trajectory], topk: int = 0
    ) -> tuple[list[list[float]], list[Support]]:
        """As `Schedule.score`; log-probs of tokens no loss reads are 0. Collective.

        One broadcast of all log-probs; with `topk` another of K ids and log-probs for each sample.
        """
        on_main = self.packer.parallel.on_main
        wanted = [sample for sample in samples if sample.loss_tokens]
        found: list[Scores] = []

        def ask() -> list[numpy.ndarray]:
            found.extend(self._found(wanted, topk))
            return [scores.logp for scores in found]

        logps = dict(zip((sample.index for sample in wanted), on_main(ask), strict=True))
        values = [_read_only(sample, logps.get(sample.index)) for sample in samples]
        return values, self._supports(wanted, found) if topk else []

    def scored_early(self, samples: list[Trajectory], topk: int = 0) -> int:
        """How many of these were begun and are scored already. Rank 0 only."""
        return sum(self._line(sample).is_scored(sample, topk) for sample in samples)

    def _found(self, samples: list[Trajectory], topk: int) -> list[Scores]:
        for sample in samples:
            self.begin(sample, topk)
        futures = [self._line(sample).take(sample, topk) for sample in samples]
        pending = set(futures)
        while pending:
            for line in self.lines.values():
                line.check_alive()
            done, pending = wait(pending, POLL_SECONDS, FIRST_COMPLETED)
            for future in done:
                future.result()  # raises what went wrong at once
        return [future.result() for future in futures]

    def _supports(self, samples: list[Trajectory], found: list[Scores]) -> list[Support]:
        """Of this rank's micro-batches; every rank hears of all samples and keeps its own."""
        parallel = self.packer.parallel
        batches, _ = self.packer(samples)
        is_last = parallel.is_last_stage
        owners = {int(i) for batch in batches if is_last for i in batch.owner.unique()}
        own = {}
        for place, sample in enumerate(samples):
            scores = parallel.on_main(lambda place=place: found[place])
            if sample.index in owners:
                own[sample.index] = scores
        return by_batch(batches, own) if is_last else []

    def _line(self, sample: Trajectory) -> Line:
        return self.lines[sample.source if sample.source in self.lines else ""]

    def close(self) -> None:
        """Stop the services that were started."""
        for line in (self.lines or {}).values():
            line.close()


class Line:
    """Rank 0's connection to one teacher: its client and, where it is the run's own, its server."""

    def __init__(
        self,
        recipe: Recipe,
        role: str,
        teacher: Teacher,
        tokenizer: Any,
        background: Background,
        first_gpu: int = 0,
    ):
        """Starts the teacher's service unless there are URLs; does not wait for it.

        role: the teacher's key in the recipe; tokenizer: the student's; first_gpu: of this machine,
        where the service's begin.
        """
        self.recipe, self.teacher, self.tokenizer = recipe, teacher, tokenizer
        self.background = background
        self.keeper: Keeper | None = None
        urls = teacher.urls
        if not urls:
            server = own_server(recipe, role, teacher, first_gpu)
            service, urls = teacher.service, [server.url]
            self.keeper = Keeper([server], service.start_timeout_s, service.max_restarts)
            self.keeper.start()
        self.client = ScoringClient(
            urls,
            identity(recipe.student.hf, tokenizer)["vocab_size"],
            recipe.rollout.temperature,
            teacher.timeout_s,
            teacher.max_in_flight,
            teacher.patience_s,
        )
        self._begun: dict[tuple, Future[Scores]] = {}

    def connect(self) -> None:
        """Return when all its servers are there; GateError if one holds the wrong model."""
        if self.keeper is not None:
            self.keeper.wait_ready()
        for url, info in self.background.submit(self.client.describe()).result().items():
            self._check(url, info)

    def _check(self, url: str, info: dict[str, Any]) -> None:
        recipe, rollout = self.recipe, self.recipe.rollout
        theirs = AutoTokenizer.from_pretrained(self.teacher.hf)
        gates_start.served_teacher(
            url,
            with_identity(info),
            identity(recipe.student.hf, self.tokenizer),
            identity(self.teacher.hf, theirs),
            recipe.gates.same_chat_template,
        )
        longest = rollout.max_prompt_tokens + rollout.max_response_tokens
        gates_start.server_fits(url, info, longest, rollout.temperature)

    def check_alive(self) -> None:
        """ServiceError if its own server is not restarted any more."""
        if self.keeper is not None and self.keeper.failure is not None:
            raise self.keeper.failure

    def begin(self, sample: Trajectory, topk: int) -> None:
        """Start scoring it, unless that was begun already."""
        key = _key(sample, topk)
        if key not in self._begun:
            self._begun[key] = self.background.submit(self.client.score(sample, topk))

    def is_scored(self, sample: Trajectory, topk: int) -> bool:
        """Whether it was begun and is done."""
        future = self._begun.get(_key(sample, topk))
        return future is not None and future.done()

    def take(self, sample: Trajectory, topk: int) -> Future[Scores]:
        """The scores of a sample that was begun, once."""
        return self._begun.pop(_key(sample, topk))

    def close(self) -> None:
        self.background.submit(self.client.close()).result()
        if self.keeper is not None:
            self.keeper.stop()


def own_server(recipe: Recipe, role: str, teacher: Teacher, first_gpu: int) -> Server:
    """`iwopd serve-teacher` for this teacher on this machine; its recipe and log in RUN/logs."""
    service, logs = teacher.service, recipe.out / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    file = logs / f"{role}.yaml"
    file.write_text(yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False))
    port = service.port or free_port()
    source = role.partition(".")[2]
    command = [
        sys.executable, "-W", "ignore", "-m", "iwopd_megatron", "serve-teacher", str(file),
        f"--host={service.host}", f"--port={port}", *([f"--source={source}"] if source else []),
    ]  # fmt: skip
    env = outer_environment() | device.beside(first_gpu, service.world)
    host = "127.0.0.1" if service.host == "0.0.0.0" else service.host
    return Server(role, command, env, logs / f"{role}.log", f"http://{host}:{port}")


def _read_only(sample: Trajectory, logp: numpy.ndarray | None) -> list[float]:
    """0 where no loss reads, as embedded models score."""
    if logp is None:
        return [0.0] * len(sample.response_ids)
    return numpy.where(sample.is_read, logp, numpy.float32(0)).tolist()


def _key(sample: Trajectory, topk: int) -> tuple:
    return sample.index, tuple(sample.prompt_ids), tuple(sample.response_ids), topk
