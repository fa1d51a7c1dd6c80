"""Retry of scoring requests: one client of one or several scoring servers with one model.

A sample goes to the server with the least to do. Whatever is not an exact answer (no connection, a
cut or late one, 5xx, ids that are not those sent) sends it to another server; a server that failed
is left alone until its /health is 200 again. A full queue (503 with Retry-After) is waited for.
"""

from __future__ import annotations

import asyncio
import time
from typing import Any

import httpx

from iwopd_megatron.batch.scores import Scores
from iwopd_megatron.batch.trajectory import Trajectory
from iwopd_megatron.errors import GateError, ServiceError
from iwopd_megatron.teacher.client import AttemptFailed, Endpoint, ServerBusy

MAX_ATTEMPTS = 5
BACKOFF_SECONDS = 0.2  # doubled with every attempt
PROBE_EVERY = 0.2


class ScoringClient:
    """Asks several servers as one. Everything but the constructor runs in one event loop."""

    def __init__(
        self,
        urls: list[str],
        vocab_size: int,
        temperature: float = 1.0,
        timeout_s: float = 600.0,
        max_in_flight: int = 64,
        patience_s: float = 1800.0,
    ):
        """timeout_s: of one request; max_in_flight: requests at a time, to all servers.

        patience_s: how long a sample waits while all servers are away or busy.
        """
        self.vocab_size, self.temperature, self.patience_s = vocab_size, temperature, patience_s
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=max_in_flight)
        self._http = httpx.AsyncClient(timeout=timeout_s, limits=limits, trust_env=False)
        self.endpoints = [Endpoint(url.rstrip("/"), self._http) for url in urls]
        self.retries = 0
        self._slots = asyncio.Semaphore(max_in_flight)
        self._probes: set[asyncio.Task[None]] = set()

    async def score_sample(self, sample: Trajectory, topk: int = 0) -> Scores:
        """Return log-probs of all response tokens, at the client's temperature.

        With `topk` also the likeliest ids. GateError for ids outside the vocabulary. ServiceError
        when servers refuse, fail MAX_ATTEMPTS times or stay away for `patience_s`.
        """
        ids, start = sample.prompt_ids + sample.response_ids, len(sample.prompt_ids) - 1
        if not 0 <= min(ids) <= max(ids) < self.vocab_size:  # it would kill an SGLang server
            raise GateError(
                f"sample {sample.index} holds a token id outside the vocabulary of "
                f"{self.vocab_size}."
            )
        failures: list[str] = []
        async with self._slots:
            end = time.monotonic() + self.patience_s  # not of the wait for a slot
            while len(failures) < MAX_ATTEMPTS:
                server = await self._pick(failures, end)
                server.in_flight += 1
                try:
                    return await server.ask(ids, start, topk, self.temperature, self.vocab_size)
                except ServerBusy as busy:
                    if time.monotonic() > end:
                        failures.append(f"{server.url} is always busy")
                        break
                    await asyncio.sleep(busy.seconds)
                except AttemptFailed as failure:
                    failures.append(f"{server.url} {failure}")
                    self.retries += 1
                    self._leave_alone(server)
                    end = time.monotonic() + self.patience_s
                    if len(failures) < MAX_ATTEMPTS:
                        await asyncio.sleep(BACKOFF_SECONDS * 2 ** (len(failures) - 1))
                finally:
                    server.in_flight -= 1
        raise ServiceError(
            f"sample {sample.index} could not be scored in {len(failures)} attempts; "
            f"the last: {failures[-1]}."
        )

    async def describe(self) -> dict[str, dict[str, Any]]:
        """Return /model_info by URL, once each server is there.

        ServiceError if one is not within `patience_s`.
        """
        end = time.monotonic() + self.patience_s
        for server in self.endpoints:
            while not await server.is_healthy():
                if time.monotonic() > end:
                    raise ServiceError(
                        f"no teacher answers at {server.url} after {self.patience_s:g} seconds; "
                        "start it, or correct the recipe's urls."
                    )
                await asyncio.sleep(PROBE_EVERY)
            server.info = await server.model_info()
        return {server.url: server.info for server in self.endpoints}

    async def close(self) -> None:
        """Close all connections."""
        for task in self._probes:
            task.cancel()
        await self._http.aclose()

    async def _pick(self, failures: list[str], end: float) -> Endpoint:
        """Return the server that is up with the least to do, one that has not failed if there is.

        failures: of this sample; end: when the wait for a server is over.
        """
        while True:
            up = [server for server in self.endpoints if not server.is_down]
            if up:
                return min(
                    up, key=lambda s: (any(f.startswith(s.url) for f in failures), s.in_flight)
                )
            if time.monotonic() > end:
                raise ServiceError(
                    f"no teacher has answered for {self.patience_s:g} seconds; "
                    f"the last failure: {failures[-1] if failures else 'none of this sample'}."
                )
            await asyncio.sleep(PROBE_EVERY)

    def _leave_alone(self, server: Endpoint) -> None:
        if server.is_down:
            return
        server.is_down = True
        task = asyncio.create_task(self._probe(server))
        self._probes.add(task)
        task.add_done_callback(self._probes.discard)

    async def _probe(self, server: Endpoint) -> None:
        """Wait until a server is up again, with the model it had."""
        while True:
            await asyncio.sleep(PROBE_EVERY)
            if await server.is_healthy() and server.is_same(await server.model_info()):
                server.is_down = False
                return
