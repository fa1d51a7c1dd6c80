"""The HTTP side of a scoring server: SGLang's paths, on FastAPI, in front of a queue of jobs."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Awaitable, Callable
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from starlette.requests import ClientDisconnect

from iwopd_megatron.batch.scores import Scores
from iwopd_megatron.teacher.scoring_protocol import (
    BadRequest,
    Limits,
    ScoringRequest,
    answer_one,
    is_finite,
    read_request,
)
from iwopd_megatron.teacher.scoring_queue import QueueClosed, QueueFull, ScoringJob, ScoringQueue

BYTES_PER_TOKEN = 16  # of a request's body, at most
PROBE_SECONDS = 30.0


class ScoringHandlers:
    """The handlers of all paths; the server is loading until `model_info` is set."""

    def __init__(self, queue: ScoringQueue, is_stopping: Callable[[], bool] = lambda: False):
        """queue: of the jobs that requests become; is_stopping: whether to take none any more."""
        self.queue, self.is_stopping = queue, is_stopping
        self.model_info: dict[str, Any] = {}
        self.limits = Limits(0, 0, queue.max_tokens)
        self.answered = 0

    @property
    def status(self) -> str:
        """The server's state: "loading", "ready" or "draining"."""
        if self.queue.is_closed or self.is_stopping():
            return "draining"
        return "ready" if self.model_info else "loading"

    @property
    def is_ready(self) -> bool:
        """Whether requests are taken."""
        return self.status == "ready"

    async def generate(self, request: Request) -> Response:
        """Answer POST /generate once its jobs are scored, or say why not."""
        if not self.is_ready:
            return _error(503, f"the teacher is {self.status}.")
        if self.queue.tokens >= self.queue.max_tokens:  # before a body is read into memory
            return _come_again()
        begin = time.monotonic()
        try:
            body = await _read(request, BYTES_PER_TOKEN * self.queue.max_tokens + 2**16)
            asked = read_request(body, self.limits)
            self.queue.put([job for job in asked.jobs if not job.future.done()])
        except BadRequest as error:
            return _error(400, str(error))
        except QueueFull:
            return _come_again()
        except QueueClosed:
            return _error(503, "the teacher is draining.")
        except ClientDisconnect:
            return Response(status_code=499)
        scores = await _unless_gone(request, asked.jobs)
        if scores is None:
            return Response(status_code=499)
        if not all(map(is_finite, scores)):
            return _error(
                500, "the teacher's log-probs are not finite; check its weights and dtype."
            )
        self.answered += len(asked.jobs)
        text = await asyncio.to_thread(self._answer, asked, scores, time.monotonic() - begin)
        return Response(text, media_type="application/json")

    def _answer(self, asked: ScoringRequest, scores: list[Scores], seconds: float) -> str:
        texts = []
        for job, own, wanted, rid in zip(
            asked.jobs, scores, asked.with_logprobs, asked.rids, strict=True
        ):
            meta = {
                "id": rid or uuid.uuid4().hex,
                "weight_version": self.model_info["weight_version"],
                "e2e_latency": seconds,
            }
            texts.append(answer_one(job, own, wanted, meta))
        return f"[{','.join(texts)}]" if asked.is_list else texts[0]

    async def probe(self) -> Response:
        """Answer GET /health_generate: a token is scored, or so much waits that work is done."""
        if not self.is_ready:
            return Response(status_code=503)
        job = ScoringJob([0, 0], 0, 0, 1.0)
        try:
            self.queue.put([job])
            await asyncio.wait_for(asyncio.wrap_future(job.future), PROBE_SECONDS)
        except QueueFull:
            return Response(status_code=200)
        except (TimeoutError, QueueClosed):
            return Response(status_code=503)
        return Response(status_code=200)

    def server_info(self) -> dict[str, Any]:
        """Return the body of GET /server_info."""
        return {
            "status": self.status,
            "max_total_num_tokens": self.queue.max_tokens,
            "max_sequence_tokens": self.limits.max_tokens,
            "tokens_in_flight": self.queue.tokens,
            "answered": self.answered,
            **self.model_info,
        }


def create_app(handlers: ScoringHandlers) -> FastAPI:
    """Return the application of SGLang's paths, both names of those that were renamed."""
    app = FastAPI(openapi_url=None)

    def add(paths: list[str], handler: Callable[..., Awaitable[Response]], method: str) -> None:
        for path in paths:
            app.add_api_route(path, handler, methods=[method], response_model=None)

    async def generate(request: Request) -> Response:
        return await handlers.generate(request)

    async def health() -> Response:
        return Response(status_code=200 if handlers.is_ready else 503)

    async def health_generate() -> Response:
        return await handlers.probe()

    async def model_info() -> Response:
        return JSONResponse(handlers.model_info, 200 if handlers.model_info else 503)

    async def server_info() -> Response:
        return JSONResponse(handlers.server_info())

    add(["/generate"], generate, "POST")
    add(["/health"], health, "GET")
    add(["/health_generate"], health_generate, "GET")
    add(["/model_info", "/get_model_info"], model_info, "GET")
    add(["/server_info", "/get_server_info"], server_info, "GET")
    return app


async def _read(request: Request, limit: int) -> bytes:
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > limit:
            raise BadRequest(f"the request has more than {limit} bytes; split it.")
    return bytes(body)


async def _unless_gone(request: Request, jobs: list[ScoringJob]) -> list[Scores] | None:
    """Return the jobs' scores; None if the client went away, whose waiting jobs are dropped."""
    scores = asyncio.gather(*(asyncio.wrap_future(job.future) for job in jobs))
    gone = asyncio.create_task(_disconnected(request))
    either: set[asyncio.Future[Any]] = {scores, gone}
    await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
    if not scores.done():
        scores.cancel()  # also the jobs' futures
        await asyncio.gather(scores, return_exceptions=True)
        return None
    gone.cancel()
    return scores.result()


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _error(status: int, sentence: str) -> Response:
    return JSONResponse({"error": {"message": sentence}}, status)


def _come_again() -> Response:
    response = _error(503, "the teacher's queue is full; come again.")
    response.headers["Retry-After"] = "1"
    return response
