"""SGLang's scoring call: `/generate` without new tokens, log-probs of the input from a position on.

Both sides are here: the client's request and its reading of an answer, the server's reading of a
request and its answer.
One difference: SGLang's input log-probs are at temperature 1 whatever `sampling_params` say; the
field `logprob_temperature`, echoed in `meta_info`, scales them here.
Shapes: T scored tokens of a sequence, K likeliest ids.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any

import numpy
from pydantic import BaseModel, Field, StrictInt, ValidationError

from iwopd_megatron.batch.scores import Scores
from iwopd_megatron.teacher.scoring_queue import ScoringJob


class BadRequest(Exception):
    """A request that this server does not answer; its text is one sentence."""


class BadAnswer(Exception):
    """An answer that does not belong to the request; its text says what is wrong."""


NO_SCORES = Scores(numpy.zeros(0, dtype=numpy.float32))


def request_body(ids: list[int], start: int, topk: int, temperature: float) -> dict[str, Any]:
    """Return the JSON body that asks for log-probs of the tokens after `start`."""
    return {
        "input_ids": ids,
        "sampling_params": {"max_new_tokens": 0, "temperature": temperature},
        "return_logprob": True,
        "logprob_start_len": start,
        "top_logprobs_num": topk,
        "logprob_temperature": temperature,
    }


class _Body(BaseModel):
    """The fields of SGLang's request that scoring has, one sequence or a list of them."""

    input_ids: list[StrictInt] | list[list[StrictInt]]
    sampling_params: dict[str, Any] | list[dict[str, Any]] = {}
    return_logprob: bool | list[bool] = False
    logprob_start_len: StrictInt | list[StrictInt] = -1
    top_logprobs_num: StrictInt | list[StrictInt] = 0
    logprob_temperature: float = Field(1.0, gt=0, allow_inf_nan=False)
    stream: bool = False
    return_text_in_logprobs: bool = False
    token_ids_logprob: Any = None
    rid: str | list[str] | None = None


@dataclass(frozen=True)
class Limits:
    """The bounds of what one server scores."""

    vocab_size: int
    max_tokens: int  # of a sequence
    max_request_tokens: int  # of all sequences of a request


@dataclass(frozen=True)
class ScoringRequest:
    """A request that was understood: a job a sequence; those that ask for no log-prob are done."""

    jobs: list[ScoringJob]
    with_logprobs: list[bool]
    rids: list[str | None]
    is_list: bool


def read_request(body: bytes, limits: Limits) -> ScoringRequest:
    """Return what a JSON body asks for; BadRequest for what this server does not do."""
    try:
        request = _Body.model_validate_json(body)
    except ValidationError as error:
        raise BadRequest(_sentence(error)) from None
    for name in ("stream", "return_text_in_logprobs", "token_ids_logprob"):
        if getattr(request, name):
            raise BadRequest(f"{name} is not supported by this server; leave it out.")
    listed = [ids for ids in request.input_ids if isinstance(ids, list)]
    sequences = listed or [[token for token in request.input_ids if isinstance(token, int)]]
    count = len(sequences)
    for params in _each("sampling_params", request.sampling_params, count):
        if params.get("max_new_tokens", 128) != 0:
            raise BadRequest(
                "this server scores and does not generate: "
                "sampling_params.max_new_tokens must be 0."
            )
    if sum(map(len, sequences)) > limits.max_request_tokens:
        raise BadRequest(
            f"the request has {sum(map(len, sequences))} tokens, at most "
            f"{limits.max_request_tokens} fit; split it."
        )
    starts = _each("logprob_start_len", request.logprob_start_len, count)
    topks = _each("top_logprobs_num", request.top_logprobs_num, count)
    asks = _each("return_logprob", request.return_logprob, count)
    jobs = []
    for ids, start, topk, asked in zip(sequences, starts, topks, asks, strict=True):
        _check(ids, start, topk, limits)
        start = start if start < len(ids) else -1  # SGLang has nothing to say then, too
        jobs.append(ScoringJob(ids, start, topk, request.logprob_temperature))
        if not asked or start in (-1, len(ids) - 1):
            jobs[-1].future.set_result(NO_SCORES)
    return ScoringRequest(jobs, asks, _each("rid", request.rid, count), is_list=bool(listed))


def _check(ids: list[int], start: int, topk: int, limits: Limits) -> None:
    if not ids:
        raise BadRequest("input_ids is empty; send at least one id.")
    if len(ids) > limits.max_tokens:
        raise BadRequest(
            f"input_ids has {len(ids)} ids, this server takes at most {limits.max_tokens}."
        )
    wrong = next((i for i in ids if not 0 <= i < limits.vocab_size), None)
    if wrong is not None:
        raise BadRequest(f"id {wrong} is outside the vocabulary of {limits.vocab_size}.")
    if start < -1:
        raise BadRequest(f"logprob_start_len={start} must be at least 0, or -1 for none.")
    if not 0 <= topk <= limits.vocab_size:
        raise BadRequest(
            f"top_logprobs_num={topk} must be between 0 and the vocabulary of {limits.vocab_size}."
        )


def _each(name: str, value: Any, count: int) -> list[Any]:
    """Return a setting of every sequence, which is given once or as a list."""
    if not isinstance(value, list):
        return [value] * count
    if len(value) != count:
        raise BadRequest(f"{name} has {len(value)} values for {count} sequences.")
    return value


def _sentence(error: ValidationError) -> str:
    """Return the first thing that is wrong with a body, as one sentence."""
    first = error.errors()[0]
    key = str(first["loc"][0]) if first["loc"] else "the body"
    if key == "input_ids":
        return "input_ids must be a list of token ids, or a list of such lists."
    return f"{key}: {first['msg']}."


def answer_one(job: ScoringJob, scores: Scores, with_logprobs: bool, meta: dict[str, Any]) -> str:
    """Return the answer to one sequence as JSON text; meta: fields that are not of the sequence."""
    meta = {
        **meta,
        "finish_reason": {"type": "length", "length": 0},
        "prompt_tokens": len(job.ids),
        "completion_tokens": 0,
        "cached_tokens": 0,
    }
    parts = [json.dumps(meta, separators=(",", ":"))[1:-1]]
    if with_logprobs:
        is_empty = job.start == -1
        parts.append(f'"logprob_temperature":{job.temperature!r}')
        parts.append(f'"input_token_logprobs":{"[]" if is_empty else _token_entries(job, scores)}')
        parts.append('"output_token_logprobs":[]')
        if job.topk:
            parts.append(f'"input_top_logprobs":{"[]" if is_empty else _topk_entries(scores)}')
            parts.append('"output_top_logprobs":[]')
    return f'{{"text":"","output_ids":[],"meta_info":{{{",".join(parts)}}}}}'


def _token_entries(job: ScoringJob, scores: Scores) -> str:
    scored = zip(scores.logp.tolist(), job.ids[job.start + 1 :], strict=True)
    first = f"[null,{job.ids[job.start]},null]"
    return f"[{','.join([first, *(_entry(logp, token) for logp, token in scored)])}]"


def _topk_entries(scores: Scores) -> str:
    if scores.topk_ids is None or scores.topk_logp is None:
        return "[null]"
    rows = zip(scores.topk_logp, scores.topk_ids, strict=True)
    lists = (f"[{','.join(map(_entry, a.tolist(), b.tolist()))}]" for a, b in rows)
    return f"[{','.join(['null', *lists])}]"


def _entry(logp: float, token: int) -> str:
    return f"[{logp:.9g},{token},null]"  # nine digits give back every fp32 exactly


def read_answer(
    answer: Any, ids: list[int], start: int, topk: int, temperature: float, vocab_size: int
) -> Scores:
    """Return scores of the tokens after `start`; BadAnswer unless it answers just this request."""
    try:
        meta = answer["meta_info"]
        entries = meta["input_token_logprobs"]
        rows = meta["input_top_logprobs"] if topk else None
        prompt_tokens = meta["prompt_tokens"]
    except (TypeError, KeyError) as error:
        raise BadAnswer(f"it lacks {error}") from None
    if prompt_tokens != len(ids):
        raise BadAnswer(f"it is of {prompt_tokens} tokens, {len(ids)} were sent")
    if temperature != 1 and meta.get("logprob_temperature") != temperature:
        raise BadAnswer(f"its log-probs are not at temperature {temperature:g}")
    if not isinstance(entries, list) or len(entries) != len(ids) - start:
        count = len(entries) if isinstance(entries, list) else "no"
        raise BadAnswer(f"it has {count} log-probs, {len(ids) - start} are due")
    logp, echoed = _columns(entries[1:])
    # SGLang calls the vocabulary's last id 0 in its answer, though it scores what was sent.
    last = vocab_size - 1
    for sent, scored in zip(ids[start + 1 :], echoed.tolist(), strict=True):
        if sent != scored and (sent, scored) != (last, 0):
            raise BadAnswer(f"it scored id {scored} where {sent} was sent")
    if not topk:
        return Scores(logp)
    if not isinstance(rows, list) or len(rows) != len(entries):
        raise BadAnswer("it does not have the likeliest ids of every token")
    if any(not isinstance(row, list) or len(row) != topk for row in rows[1:]):
        raise BadAnswer(f"it does not have {topk} likeliest ids of every token")
    topk_logp, topk_ids = _columns([entry for row in rows[1:] for entry in row])
    if topk_ids.size and not 0 <= topk_ids.min() <= topk_ids.max() < vocab_size:
        raise BadAnswer(f"an id is outside the vocabulary of {vocab_size}")
    return Scores(logp, topk_ids.reshape(-1, topk), topk_logp.reshape(-1, topk))


def _columns(entries: list[Any]) -> tuple[numpy.ndarray, numpy.ndarray]:
    """Return fp32 log-probs and int32 ids of `[logprob, id, text]` entries."""
    try:
        logps, ids = [entry[0] for entry in entries], [entry[1] for entry in entries]
        if any(type(logp) not in (float, int) for logp in logps):
            raise BadAnswer("a log-prob is not a number")
        if any(type(token) is not int for token in ids):
            raise BadAnswer("an id is not a number")
        return numpy.array(logps, dtype=numpy.float32), numpy.array(ids, dtype=numpy.int32)
    except (TypeError, IndexError, KeyError, OverflowError):
        raise BadAnswer("an entry is not [logprob, id, text]") from None


def is_finite(scores: Scores) -> bool:
    """Return whether JSON can say all scores: it has no NaN and no infinity."""
    parts = (scores.logp, scores.topk_logp)
    return all(part is None or math.isfinite(float(part.sum())) for part in parts)
