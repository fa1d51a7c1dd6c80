"""The connection to one teacher behind HTTP: its client and, where it is the run's own, its server.

Rank 0 has it; `remote.py` has all of a recipe.
"""

from __future__ import annotations

import sys
from concurrent.futures import Future
from typing import Any

import yaml
from transformers import AutoTokenizer

from iwopd_megatron.batch.scores import Scores
from iwopd_megatron.batch.trajectory import Trajectory
from iwopd_megatron.config.models import Service, Teacher
from iwopd_megatron.config.recipe import Recipe
from iwopd_megatron.hf import agreement
from iwopd_megatron.hf.fingerprint import identity, with_identity
from iwopd_megatron.runtime import device
from iwopd_megatron.runtime.background import Background
from iwopd_megatron.runtime.keeper import Keeper
from iwopd_megatron.runtime.services import Server, free_port, outer_environment
from iwopd_megatron.teacher.retry import ScoringClient


class TeacherConnection:
    """Scores samples by one teacher's servers, each as soon as it is begun."""

    def __init__(
        self,
        recipe: Recipe,
        role: str,
        teacher: Teacher,
        tokenizer: Any,
        background: Background,
        first_gpu: int = 0,
    ):
        """Start the teacher's service unless there are URLs; do not wait for it.

        role: the teacher's key in the recipe; tokenizer: the student's; first_gpu: of this machine,
        where the service's begin.
        """
        self.recipe, self.teacher, self.tokenizer = recipe, teacher, tokenizer
        self.background = background
        self.keeper: Keeper | None = None  # None: the servers are not the run's own
        urls, service = teacher.urls, teacher.service
        if service is not None and not urls:
            server = own_server(recipe, role, service, first_gpu)
            urls = [server.url]
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
        """Return when all its servers are there.

        ServiceError if one does not come; GateError if one holds the wrong model.
        """
        if self.keeper is not None:
            self.keeper.wait_ready()
        for url, info in self.background.submit(self.client.describe()).result().items():
            self._check(url, info)

    def _check(self, url: str, info: dict[str, Any]) -> None:
        recipe, rollout = self.recipe, self.recipe.rollout
        theirs = AutoTokenizer.from_pretrained(self.teacher.hf)
        agreement.served_teacher(
            url,
            with_identity(info),
            identity(recipe.student.hf, self.tokenizer),
            identity(self.teacher.hf, theirs),
            recipe.gates.same_chat_template,
        )
        longest = rollout.max_prompt_tokens + rollout.max_response_tokens
        agreement.server_fits(url, info, longest, rollout.temperature)

    def check_alive(self) -> None:
        """Raise ServiceError if its own server is not restarted any more."""
        if self.keeper is not None and self.keeper.failure is not None:
            raise self.keeper.failure

    def begin(self, sample: Trajectory, topk: int) -> None:
        """Start scoring a sample, unless that was begun already."""
        key = _key(sample, topk)
        if key not in self._begun:
            scoring = self.client.score_sample(sample, topk)
            self._begun[key] = self.background.submit(scoring)

    def is_scored(self, sample: Trajectory, topk: int) -> bool:
        """Return whether a sample was begun and is done."""
        future = self._begun.get(_key(sample, topk))
        return future is not None and future.done()

    def take(self, sample: Trajectory, topk: int) -> Future[Scores]:
        """Return the scores to come of a sample that was begun, and forget it."""
        return self._begun.pop(_key(sample, topk))

    def close(self) -> None:
        """Close the client, and stop the server that is the run's own."""
        self.background.submit(self.client.close()).result()
        if self.keeper is not None:
            self.keeper.stop()


def own_server(recipe: Recipe, role: str, service: Service, first_gpu: int) -> Server:
    """Return `iwopd serve-teacher` for a teacher on this machine; its recipe and log in RUN/logs.

    role: the teacher's key in the recipe.
    """
    logs = recipe.out / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    file = logs / f"{role}.yaml"
    file.write_text(yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False))
    port = service.port or free_port()
    source = role.partition(".")[2]
    command = [sys.executable, "-W", "ignore", "-m", "iwopd_megatron", "serve-teacher", str(file)]
    command += [f"--host={service.host}", f"--port={port}"]
    command += [f"--source={source}"] if source else []
    env = outer_environment() | device.beside(first_gpu, service.world)
    host = "127.0.0.1" if service.host == "0.0.0.0" else service.host
    return Server(role, command, env, logs / f"{role}.log", f"http://{host}:{port}")


def _key(sample: Trajectory, topk: int) -> tuple:
    return sample.index, tuple(sample.prompt_ids), tuple(sample.response_ids), topk
