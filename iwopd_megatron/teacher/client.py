"""One scoring server over HTTP: asked once, looked at, and told from another one.

SGLang's or `iwopd serve-teacher`. `retry.py` asks again, and asks others.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import httpx

from iwopd_megatron.batch.scores import Scores
from iwopd_megatron.errors import ServiceError
from iwopd_megatron.teacher.scoring_protocol import BadAnswer, read_answer, request_body

PROBE_SECONDS = 5.0
IDENTITY = ("model_path", "weight_version", "tokenizer_fingerprint", "config_fingerprint")


class AttemptFailed(Exception):
    """This attempt did not work out; another may."""


class ServerBusy(Exception):
    """The server's queue is full: come again after `seconds`."""

    def __init__(self, seconds: float):
        super().__init__(seconds)
        self.seconds = seconds


@dataclass(eq=False)
class Endpoint:
    """One server, and what its client knows of it."""

    url: str
    http: httpx.AsyncClient
    in_flight: int = 0
    is_down: bool = False
    info: dict[str, Any] = field(default_factory=dict)  # what it was when first asked

    async def ask(
        self, ids: list[int], start: int, topk: int, temperature: float, vocab_size: int
    ) -> Scores:
        """Return the scores of the tokens after `start`, from one request.

        AttemptFailed, ServerBusy: another attempt may do it; ServiceError: the server refuses.
        """
        body = request_body(ids, start, topk, temperature)
        try:
            response = await self.http.post(f"{self.url}/generate", json=body)
        except httpx.HTTPError as error:
            raise AttemptFailed(f"did not answer ({type(error).__name__})") from None
        status = response.status_code
        if status in (429, 503) and "retry-after" in response.headers:
            raise ServerBusy(_seconds(response.headers["retry-after"]))
        if status >= 500:
            raise AttemptFailed(f"answered {status}: {_reason(response)}")
        if status != 200:
            raise ServiceError(f"{self.url} refuses a sample: {_reason(response)}")
        try:
            return read_answer(response.json(), ids, start, topk, temperature, vocab_size)
        except (BadAnswer, ValueError) as error:
            raise AttemptFailed(f"gave a malformed answer: {error}") from None

    async def is_healthy(self) -> bool:
        """Return whether /health is 200."""
        try:
            response = await self.http.get(f"{self.url}/health", timeout=PROBE_SECONDS)
        except httpx.HTTPError:
            return False
        return response.status_code == 200

    async def model_info(self) -> dict[str, Any]:
        """Return /model_info, or SGLang's old name of it; {} where there is neither."""
        for path in ("model_info", "get_model_info"):
            try:
                response = await self.http.get(f"{self.url}/{path}", timeout=PROBE_SECONDS)
                if response.status_code == 200 and isinstance(response.json(), dict):
                    return response.json()
            except (httpx.HTTPError, ValueError):
                continue
        return {}

    def is_same(self, info: dict[str, Any]) -> bool:
        """Return whether a server that says this of itself holds the model it held at first."""
        return all(info.get(key) == self.info.get(key) for key in IDENTITY if self.info)


def _seconds(text: str) -> float:
    """Return the seconds of a Retry-After header, at most 60; 1 for a date."""
    return min(float(text), 60.0) if text.isdigit() else 1.0


def _reason(response: httpx.Response) -> str:
    """Return the server's sentence; SGLang has three ways to give one."""
    try:
        body = response.json()
    except ValueError:
        return response.text[:300] or response.reason_phrase
    error = body.get("error", body) if isinstance(body, dict) else body
    return str(error.get("message", error) if isinstance(error, dict) else error)[:300]
