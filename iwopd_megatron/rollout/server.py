"""One rollout server over HTTP: the protocol of every kind of server, and what travels.

`sglang.py` and `vllm.py` speak each engine's API; `pool.py` knows which servers are up, `retry.py`
asks them, `push.py` sends them new weights.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import httpx
import numpy
import torch

from iwopd_megatron.errors import UserError
from iwopd_megatron.hf.config import HfConfig
from iwopd_megatron.rollout.engine import Sampling
from iwopd_megatron.rollout.proof import Fingerprints

NamedTensors = Sequence[tuple[str, torch.Tensor]]
ALIVE_SECONDS = 20.0  # for what an HTTP front answers at once
CONTROL_SECONDS = 600.0


class ServerLost(Exception):
    """No usable answer: dead, hung, cut off or broken. Another server may do it."""


class ServerRefused(Exception):
    """The server understood and said no (4xx): asking again is no use."""


@dataclass(frozen=True)
class Completion:
    """What one request brought: token ids, their log-probs (nats, at the temperature), the reason
    of its end: "stop", "length", or "abort" when the server was told to let go of it.
    """

    ids: list[int]
    logp: list[float]
    finish: str
    versions: list[str] = field(default_factory=list)  # weight version of every token
    experts: numpy.ndarray | None = None  # [prompt + answer - 1, layers, top k], `Trajectory`'s

    def then(self, rest: Completion) -> Completion:
        """Return both as one; `rest` continues these tokens, and its experts are those of all."""
        ids, logp = self.ids + rest.ids, self.logp + rest.logp
        return Completion(ids, logp, rest.finish, self.versions + rest.versions, rest.experts)


class RolloutServer(Protocol):
    """One server. Methods raise ServerLost or ServerRefused; tensors have Hugging Face names."""

    url: str
    tp: int  # ranks the server runs on; known once it is ready

    async def is_alive(self) -> bool:
        """Return whether it answers at all within a short time; never raises."""
        ...

    async def wait_ready(self) -> None:
        """Return when it can generate; ServerLost if it cannot in time."""
        ...

    async def describe(self) -> dict[str, Any]:
        """Return what it tells of its model; `model_path` where it names its folder."""
        ...

    async def generate(self, ids: list[int], sampling: Sampling) -> Completion:
        """Continue one prompt; UserError if an id is outside the vocabulary."""
        ...

    async def prompt_logps(self, ids: list[int]) -> list[float]:
        """Return the log-probs (nats, temperature 1) of ids[1:]."""
        ...

    async def pause(self) -> None:
        """Stop generating; requests in flight wait, and go on under the next weights."""
        ...

    async def resume(self) -> None:
        """Go on generating after `pause`; no-op without one."""
        ...

    async def load_folder(self, folder: str, version: int) -> None:
        """Replace all weights by those of a Hugging Face folder that the server can read."""
        ...

    async def begin_update(self) -> None:
        """Get ready for new weights; one that was cut off before is given up."""
        ...

    async def send(self, tensors: NamedTensors) -> None:
        """Give it some of the new weights, in the request itself."""
        ...

    async def join_group(
        self, address: str, port: int, first: int, world: int, group: str, backend: str
    ) -> None:
        """Join a process group whose rank 0 sends weights; the server's ranks start at `first`."""
        ...

    async def receive(self, tensors: NamedTensors, group: str) -> None:
        """Take these tensors (only names, types and shapes are sent) as rank 0's next broadcast."""
        ...

    async def leave_group(self, group: str) -> None:
        """Leave the process group of that name."""
        ...

    async def end_update(self, version: int) -> None:
        """End an update: forget cached prefixes, and label answers with `version`."""
        ...

    def fingerprints(self) -> Fingerprints:
        """Return what `checksums` is compared with, once all weights were added to it."""
        ...

    async def checksums(self) -> list[dict[str, str]]:
        """Return, for each rank, a hash of each tensor it holds by its name; see `proof.py`."""
        ...


class HttpServer:
    """The base of both kinds of server: address, requests, checks of what goes and comes."""

    alive_path: str  # answered at once unless the process hangs

    def __init__(
        self,
        url: str,
        http: httpx.AsyncClient,
        hf: HfConfig,
        eos_ids: set[int],
        timeout: float = 3600.0,
        ready_timeout: float = 1800.0,
        pause_mode: str = "retract",
    ):
        """hf: config.json of the model; timeout, ready_timeout: of one answer, of a start, seconds.

        pause_mode: the recipe's `rollout.pause`.
        """
        self.url, self.http, self.hf = url.rstrip("/"), http, hf
        self.eos_ids = sorted(eos_ids)
        self.timeout, self.ready_timeout, self.pause_mode = timeout, ready_timeout, pause_mode
        self.tp = 1

    async def _get(self, path: str) -> Any:
        return await ask(self.http, "GET", self.url + path, ALIVE_SECONDS)

    async def _post(self, path: str, timeout: float = CONTROL_SECONDS, /, **body: Any) -> Any:
        return await ask(self.http, "POST", self.url + path, timeout, body)

    async def is_alive(self) -> bool:
        """Return whether it answers at all within a short time; never raises."""
        try:
            await self._get(self.alive_path)
        except (ServerLost, ServerRefused):
            return False
        return True

    def _checked(self, ids: list[int]) -> list[int]:
        vocab = self.hf.vocab_size
        if not ids or not 0 <= min(ids) <= max(ids) < vocab:
            raise UserError(
                f"a prompt is empty or holds ids outside the vocabulary of {vocab}; "
                "its tokenizer is not the model's."
            )
        return ids

    def _experts(self, flat: numpy.ndarray, tokens: int) -> numpy.ndarray:
        """Return `Completion.experts` from the engine's ids of so many tokens, end to end."""
        shape = tokens, self.hf.num_hidden_layers, self.hf.num_experts_per_tok
        if flat.size != math.prod(shape):
            raise ServerLost(f"{self.url}: {flat.size} routed experts for {tokens} tokens")
        experts = self.hf.num_experts
        if not 0 <= flat.min() <= flat.max() < experts:
            raise ServerLost(f"{self.url}: a routed expert is none of the model's {experts}")
        return flat.astype(numpy.uint8 if experts <= 256 else numpy.int16).reshape(shape)


def header(tensors: NamedTensors) -> dict[str, list[Any]]:
    """Return names, types and shapes of tensors whose bytes come another way, for JSON."""
    return {
        "names": [name for name, _ in tensors],
        "dtypes": [str(tensor.dtype).removeprefix("torch.") for _, tensor in tensors],
        "shapes": [list(tensor.shape) for _, tensor in tensors],
    }


async def ask(
    http: httpx.AsyncClient, method: str, url: str, timeout: float, body: Any = None
) -> Any:
    """Return the JSON answer of one request, None if its body is not of that type.

    ServerLost: no answer, a status from 500, or broken JSON; ServerRefused: a status from 400.
    """
    try:
        reply = await http.request(method, url, json=body, timeout=timeout)
    except (httpx.TransportError, httpx.DecodingError) as error:
        raise ServerLost(f"{url}: {type(error).__name__} {error}".rstrip()) from None
    if reply.status_code >= 500:
        raise ServerLost(f"{url} answered {reply.status_code}: {_message(reply)}")
    if reply.status_code >= 400:
        raise ServerRefused(f"{url} answered {reply.status_code}: {_message(reply)}")
    if not reply.headers.get("content-type", "").startswith("application/json"):
        return None
    try:
        return reply.json()
    except ValueError:
        raise ServerLost(f"{url} sent something that is no JSON: {reply.text[:80]!r}") from None


def _message(reply: httpx.Response) -> str:
    """Return the error's text, at most 300 characters; engines wrap it in several shapes."""
    try:
        body = reply.json()
    except ValueError:
        return reply.text[:300]
    while isinstance(body, dict):
        body = next((body[k] for k in ("error", "message", "detail") if k in body), str(body))
    return str(body)[:300]
