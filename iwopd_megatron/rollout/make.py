"""Make the rollout engine that a recipe asks for, and the command of each server it starts."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
from transformers import AutoTokenizer

from iwopd_megatron.config.recipe import Recipe
from iwopd_megatron.errors import RecipeError
from iwopd_megatron.hf.config import read_hf_config
from iwopd_megatron.hf.fingerprint import identity
from iwopd_megatron.hf.folder import eos_ids
from iwopd_megatron.models.gpt import DTYPES
from iwopd_megatron.rollout.broadcast import BroadcastPush
from iwopd_megatron.rollout.controller import ServerController
from iwopd_megatron.rollout.embedded import HfEngine
from iwopd_megatron.rollout.engine import RolloutEngine
from iwopd_megatron.rollout.pool import Replica, ServerPool
from iwopd_megatron.rollout.push import FolderPush, Push, RequestPush
from iwopd_megatron.rollout.server import RolloutServer
from iwopd_megatron.rollout.servers import Canary, ServerEngine
from iwopd_megatron.rollout.sglang import SglangServer
from iwopd_megatron.rollout.vllm import VllmServer
from iwopd_megatron.runtime.background import Background
from iwopd_megatron.runtime.keeper import Keeper
from iwopd_megatron.runtime.main_only import main_only
from iwopd_megatron.runtime.parallel import Parallel
from iwopd_megatron.runtime.services import Server, free_port, outer_environment

KINDS: dict[str, type[SglangServer] | type[VllmServer]] = {
    "sglang": SglangServer,
    "vllm": VllmServer,
}


def make_engine(
    recipe: Recipe, parallel: Parallel, say: Callable[[str], None], canary: Canary | None = None
) -> RolloutEngine:
    """Return the recipe's engine; its servers are ready. Collective.

    say: tells people what happens to servers. RecipeError where the recipe has no servers.
    """
    student, rollout = recipe.student, recipe.rollout
    if rollout.engine == "hf":
        eos = eos_ids(student.hf)
        more = rollout.batch_size, rollout.threads, rollout.bf16_products
        return HfEngine(student.hf, DTYPES[student.dtype], eos, *more)
    servers = main_only(parallel, lambda: _controller(recipe, say))
    engine = ServerEngine(servers, rollout.verify_every, canary)
    engine.wait_ready()
    return engine


def _controller(recipe: Recipe, say: Callable[[str], None]) -> ServerController:
    """Return rank 0's control of the servers; those that are ours are not started yet."""
    rollout, servers, student = recipe.rollout, recipe.rollout.servers, recipe.student.hf
    if not servers.urls and not servers.start:
        raise RecipeError(
            f"rollout.engine={rollout.engine} has servers on a cluster only (cluster.rollout); "
            "use 'iwopd launch', or write rollout.servers.start=1 to start one here."
        )
    started = [] if servers.urls else [_server(recipe, i) for i in range(servers.start)]
    keeper = Keeper(
        started, servers.ready_timeout_s, servers.max_restarts, servers.hang_timeout_s, say
    )
    http = httpx.AsyncClient(limits=httpx.Limits(max_connections=None), trust_env=False)
    hf, kind, eos = read_hf_config(student), KINDS[rollout.engine], eos_ids(student)

    def client(url: str) -> RolloutServer:
        return kind(
            url, http, hf, eos, servers.request_timeout_s, servers.ready_timeout_s, rollout.pause
        )

    replicas = [Replica(client(url)) for url in servers.urls]
    replicas += [Replica(client(process.url), own=process) for process in started]
    push = _push(recipe)
    pool = ServerPool(replicas, servers.max_running, eos, say, rollout.max_staleness, push.catch_up)
    own = identity(student, AutoTokenizer.from_pretrained(student))
    return ServerController(Background("rollout"), pool, push, keeper, own)


def _push(recipe: Recipe) -> Push:
    rollout = recipe.rollout
    if rollout.sync == "disk":
        return FolderPush(rollout.sync_folder or recipe.out / "weights", recipe.student.hf)
    if rollout.sync == "tensor":
        return RequestPush()
    return BroadcastPush(rollout.sync_address)


def _server(recipe: Recipe, number: int) -> Server:
    """Return the process of one started server; its log is RUN/logs/rollout-N.log."""
    servers = recipe.rollout.servers
    port = free_port()
    command = [str(servers.python or sys.executable), *server_command(recipe, port)]
    env = server_environment(recipe)
    log = recipe.out / "logs" / f"rollout-{number}.log"
    return Server(f"rollout server {number}", command, env, log, f"http://127.0.0.1:{port}")


def server_command(recipe: Recipe, port: int, host: str = "127.0.0.1") -> list[str]:
    """Return what follows the Python's name to start one of the recipe's rollout servers."""
    options = KINDS[recipe.rollout.engine].options(recipe, port, host)
    options |= recipe.rollout.servers.args
    return [*KINDS[recipe.rollout.engine].module, *flags(options)]


def server_environment(recipe: Recipe) -> dict[str, str]:
    """Return the whole environment of a server that iwopd starts."""
    kind = KINDS[recipe.rollout.engine]
    return outer_environment() | kind.environment() | recipe.rollout.servers.env


def flags(options: dict[str, Any]) -> list[str]:
    """Return command-line words: {"a": 1, "b": True, "c": None} gives --a 1 --b."""
    words: list[str] = []
    for name, value in options.items():
        if value is True:
            words.append(f"--{name}")
        elif value is not None and value is not False:
            words += [f"--{name}", str(Path(value) if isinstance(value, Path) else value)]
    return words
