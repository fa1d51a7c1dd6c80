"""The rollout engine a recipe asks for, and the servers it starts."""

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
from iwopd_megatron.rollout.embedded import HfEngine
from iwopd_megatron.rollout.engine import RolloutEngine
from iwopd_megatron.rollout.pool import Place, Pool
from iwopd_megatron.rollout.push import BroadcastPush, FolderPush, Push, RequestPush, Targets
from iwopd_megatron.rollout.servers import Canary, ServerEngine
from iwopd_megatron.rollout.sglang import SglangServer
from iwopd_megatron.rollout.vllm import VllmServer
from iwopd_megatron.runtime.background import Background
from iwopd_megatron.runtime.keeper import Keeper
from iwopd_megatron.runtime.parallel import Parallel
from iwopd_megatron.runtime.services import Server, free_port, outer_environment

KINDS = {"sglang": SglangServer, "vllm": VllmServer}


def make_engine(
    recipe: Recipe, parallel: Parallel, say: Callable[[str], None], canary: Canary | None = None
) -> RolloutEngine:
    """Collective; servers are ready when it returns."""
    student, rollout = recipe.student, recipe.rollout
    eos = eos_ids(student.hf)
    if rollout.engine == "hf":
        return HfEngine(student.hf, DTYPES[student.dtype], eos, rollout.batch_size)
    if not parallel.is_main:
        engine = ServerEngine(parallel, None, None, None, rollout.verify_every, canary)
    else:
        engine = _main_engine(recipe, parallel, eos, say, canary)
    tokenizer = AutoTokenizer.from_pretrained(student.hf)
    parallel.on_main(lambda: engine.wait_ready(identity(student.hf, tokenizer)))
    return engine


def _main_engine(
    recipe: Recipe,
    parallel: Parallel,
    eos: set[int],
    say: Callable[[str], None],
    canary: Canary | None,
) -> ServerEngine:
    rollout, servers = recipe.rollout, recipe.rollout.servers
    if not servers.urls and not servers.start:
        raise RecipeError(
            f"rollout.engine={rollout.engine} has servers on a cluster only (cluster.rollout); "
            "use 'iwopd launch', or write rollout.servers.start=1 to start one here."
        )
    started = [] if servers.urls else [_server(recipe, i) for i in range(servers.start)]
    keeper = Keeper(
        started, servers.ready_timeout_s, servers.max_restarts, servers.hang_timeout_s, say
    )
    loop = Background("rollout")
    http = httpx.AsyncClient(limits=httpx.Limits(max_connections=None), trust_env=False)
    hf, kind = read_hf_config(recipe.student.hf), KINDS[rollout.engine]
    places = []
    for url in servers.urls or [server.url for server in started]:
        server = kind(
            url, http, hf, eos, servers.request_timeout_s, servers.ready_timeout_s, rollout.pause
        )
        places.append(Place(server))
    for place, server in zip(places, started, strict=False):
        place.own = server
    pool = Pool(places, servers.max_running, eos, say)
    pool.max_staleness = rollout.max_staleness
    push = _push(recipe, Targets(loop, pool))
    pool.catch_up = push.catch_up
    return ServerEngine(parallel, pool, push, loop, rollout.verify_every, canary, keeper)


def _push(recipe: Recipe, targets: Targets) -> Push:
    rollout = recipe.rollout
    if rollout.sync == "disk":
        return FolderPush(targets, rollout.sync_folder or recipe.out / "weights", recipe.student.hf)
    if rollout.sync == "tensor":
        return RequestPush(targets)
    return BroadcastPush(targets, rollout.sync_address)


def _server(recipe: Recipe, number: int) -> Server:
    """The process of one started server; its log is RUN/logs/rollout-N.log."""
    servers = recipe.rollout.servers
    port = free_port()
    command = [str(servers.python or sys.executable), *server_command(recipe, port)]
    env = server_environment(recipe)
    log = recipe.out / "logs" / f"rollout-{number}.log"
    return Server(f"rollout server {number}", command, env, log, f"http://127.0.0.1:{port}")


def server_command(recipe: Recipe, port: int, host: str = "127.0.0.1") -> list[str]:
    """What follows the Python's name to start one of the recipe's rollout servers."""
    options = KINDS[recipe.rollout.engine].options(recipe, port, host)
    options |= recipe.rollout.servers.args
    return [*KINDS[recipe.rollout.engine].module, *flags(options)]


def server_environment(recipe: Recipe) -> dict[str, str]:
    """The whole environment of a server that iwopd starts."""
    kind = KINDS[recipe.rollout.engine]
    return outer_environment() | kind.environment() | recipe.rollout.servers.env


def flags(options: dict[str, Any]) -> list[str]:
    """{"a": 1, "b": True, "c": None} -> --a 1 --b"""
    words: list[str] = []
    for name, value in options.items():
        if value is True:
            words.append(f"--{name}")
        elif value is not None and value is not False:
            words += [f"--{name}", str(Path(value) if isinstance(value, Path) else value)]
    return words
