"""Client of scoring servers: SGLang's, or `iwopd serve-teacher`; one or several with one model.

A sample goes to the server with the least to do. Whatever is not an exact answer (no connection, a
cut or late one, 5xx, ids that are not those sent) sends it to another server; a server that failed
is left alone until its /health is 200 again. A full queue (503 with Retry-After) is waited for.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from typing import Any

import httpx

from iwopd_megatron.batch.scores import Scores
from iwopd_megatron.batch.trajectory import Trajectory
from iwopd_megatron.errors import GateError, ServiceError
from iwopd_megatron.teacher.scoring_protocol import BadAnswer, read_answer, request_body

MAX_ATTEMPTS = 5
BACKOFF_SECONDS = 0.2  # doubled with every attempt
PROBE_EVERY, PROBE_SECONDS = 0.2, 5.0
IDENTITY = ("model_path", "weight_version", "tokenizer_fingerprint", "config_fingerprint")


class _Failed(Exception):
    """This attempt did not work out; another may."""


class _Busy(Exception):
    """Come again after `args[0]` seconds."""


@dataclass(eq=False)
class _Endpoint:
    url: str
    in_flight: int = 0
    is_down: bool = False
    info: dict[str, Any] = field(default_factory=dict)  # what it was when first asked


class ScoringClient:
    """Everything but the constructor runs in one event loop."""

    def __init__(
        self,
        urls: list[str],
        vocab_size: int,
        temperature: float = 1.0,
        timeout_s: float = 600.0,
        max_in_flight: int = 64,
        patience_s: float = 1800.0,
    ):
        self.vocab_size, self.temperature, self.patience_s = vocab_size, temperature, patience_s
        self.endpoints = [_Endpoint(url.rstrip("/")) for url in urls]
        self.retries = 0
        self._slots = asyncio.Semaphore(max_in_flight)
        self._probes: set[asyncio.Task] = set()
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=max_in_flight)
        self._http = httpx.AsyncClient(timeout=timeout_s, limits=limits, trust_env=False)

    async def score(self, sample: Trajectory, topk: int = 0) -> Scores:
        """Log-probs of all response tokens, at the client's temperature.

        ServiceError when servers refuse, fail MAX_ATTEMPTS times or stay away for `patience_s`.
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
                    return await self._ask(server, ids, start, topk)
                except _Busy as busy:
                    if time.monotonic() > end:
                        failures.append(f"{server.url} is always busy")
                        break
                    await asyncio.sleep(busy.args[0])
                except _Failed as failure:
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
        """/model_info by URL, once each server is there; waits for it at most `patience_s`."""
        end = time.monotonic() + self.patience_s
        for server in self.endpoints:
            while not await self._is_healthy(server):
                if time.monotonic() > end:
                    raise ServiceError(
                        f"no teacher answers at {server.url} after {self.patience_s:g} seconds; "
                        "start it, or correct the recipe's urls."
                    )
                await asyncio.sleep(PROBE_EVERY)
            server.info = await self._info(server)
        return {server.url: server.info for server in self.endpoints}

    async def close(self) -> None:
        for task in self._probes:
            task.cancel()
        await self._http.aclose()

    async def _pick(self, failures: list[str], end: float) -> _Endpoint:
        """The server up with the least to do, one that has not failed this sample if there is."""
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

    async def _ask(self, server: _Endpoint, ids: list[int], start: int, topk: int) -> Scores:
        body = request_body(ids, start, topk, self.temperature)
        try:
            response = await self._http.post(f"{server.url}/generate", json=body)
        except httpx.HTTPError as error:
            raise _Failed(f"did not answer ({type(error).__name__})") from None
        status = response.status_code
        if status in (429, 503) and "retry-after" in response.headers:
            raise _Busy(_seconds(response.headers["retry-after"]))
        if status >= 500:
            raise _Failed(f"answered {status}: {_reason(response)}")
        if status != 200:
            raise ServiceError(f"{server.url} refuses a sample: {_reason(response)}")
        try:
            return read_answer(response.json(), ids, start, topk, self.temperature, self.vocab_size)
        except (BadAnswer, ValueError) as error:
            raise _Failed(f"gave a malformed answer: {error}") from None

    def _leave_alone(self, server: _Endpoint) -> None:
        if server.is_down:
            return
        server.is_down = True
        task = asyncio.create_task(self._probe(server))
        self._probes.add(task)
        task.add_done_callback(self._probes.discard)

    async def _probe(self, server: _Endpoint) -> None:
        """Until it is up again, with the model it had."""
        while True:
            await asyncio.sleep(PROBE_EVERY)
            if not await self._is_healthy(server):
                continue
            info = await self._info(server)
            if all(info.get(key) == server.info.get(key) for key in IDENTITY if server.info):
                server.is_down = False
                return

    async def _is_healthy(self, server: _Endpoint) -> bool:
        try:
            response = await self._http.get(f"{server.url}/health", timeout=PROBE_SECONDS)
        except httpx.HTTPError:
            return False
        return response.status_code == 200

    async def _info(self, server: _Endpoint) -> dict[str, Any]:
        """SGLang's old name of the path too; {} where there is neither."""
        for path in ("model_info", "get_model_info"):
            try:
                response = await self._http.get(f"{server.url}/{path}", timeout=PROBE_SECONDS)
                if response.status_code == 200 and isinstance(response.json(), dict):
                    return response.json()
            except (httpx.HTTPError, ValueError):
                continue
        return {}


def _seconds(text: str) -> float:
    return min(float(text), 60.0) if text.isdigit() else 1.0


def _reason(response: httpx.Response) -> str:
    """The server's sentence; SGLang has three ways to give one."""
    try:
        body = response.json()
    except ValueError:
        return response.text[:300] or response.reason_phrase
    error = body.get("error", body) if isinstance(body, dict) else body
    return str(error.get("message", error) if isinstance(error, dict) else error)[:300]
