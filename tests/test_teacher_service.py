"""The teacher service: scores against Hugging Face, SGLang's form, refusals, limits, draining."""

import asyncio
import json
import os
import signal
import socket
import sys
import threading

import httpx
import pytest
import torch
from served import ROOT, TEACHER, served, wait_until

from iwopd_megatron.batch.trajectory import Trajectory
from iwopd_megatron.parity.hf_reference import hf_model
from iwopd_megatron.runtime.services import Server, free_port
from iwopd_megatron.teacher.retry import ScoringClient
from iwopd_megatron.teacher.scoring_queue import QueueClosed, QueueFull, ScoringJob, ScoringQueue

LAYOUTS = [{}, {"tp": 2}, {"tp": 2, "ep": 2}, {"pp": 2}, {"ep": 2}, {"cp": 2}]
LENGTHS = [(9, 43), (1, 1), (5, 2), (12, 30), (3, 17), (20, 40), (9, 43), (2, 60), (7, 7)]


def make_samples(lengths=LENGTHS):
    generator = torch.Generator().manual_seed(3)
    samples = []
    for i, (prompt, response) in enumerate(lengths):
        ids = torch.randint(0, 16, (prompt + response,), generator=generator).tolist()
        samples.append(Trajectory(i, ids[:prompt], ids[prompt:]))
    return samples


SAMPLES = make_samples()


def ask(urls, samples=SAMPLES, topk=0, temperature=1.0, **settings):
    """All samples at the same time."""

    async def run():
        client = ScoringClient(urls, 16, temperature, **{"timeout_s": 30, **settings})
        scores = await asyncio.gather(*(client.score_sample(sample, topk) for sample in samples))
        await client.close()
        return scores, client.retries

    return asyncio.run(run())


@pytest.fixture(scope="module")
def reference():
    """Log-probs `[T, V]` of every sample's response positions."""
    model = hf_model(TEACHER, torch.float32)

    def logps(sample, temperature=1.0):
        ids = torch.tensor([sample.prompt_ids + sample.response_ids])
        with torch.no_grad():
            logits = model(ids).logits[0, len(sample.prompt_ids) - 1 : -1]
        return (logits / temperature).log_softmax(-1)

    return logps


def check(samples, scores, reference, temperature=1.0, topk=0):
    for sample, own in zip(samples, scores, strict=True):
        logp_TV = reference(sample, temperature)
        expected = logp_TV.gather(1, torch.tensor(sample.response_ids)[:, None])[:, 0]
        assert torch.allclose(torch.from_numpy(own.logp), expected, atol=2e-5)
        if topk:
            best = logp_TV.topk(topk).values
            assert torch.allclose(torch.from_numpy(own.topk_logp), best, atol=2e-5)
            at_ids = logp_TV.gather(1, torch.from_numpy(own.topk_ids).long())
            assert torch.allclose(at_ids, best, atol=2e-5)
            assert all(len(set(row)) == topk for row in own.topk_ids.tolist())


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: "_".join(layout) or "one")
def test_scores_are_those_of_hugging_face(layout, reference):
    """Many requests at a time, of unequal lengths, over several micro-batches."""
    with served(layout, microbatch_tokens=80) as service:
        scores, retries = ask([service.url], temperature=0.7, topk=5)
        check(SAMPLES, scores, reference, 0.7, 5)
        assert retries == 0
        check(SAMPLES, ask([service.url])[0], reference)


@pytest.fixture(scope="module")
def service():
    with served(microbatch_tokens=100, max_queue_tokens=400) as running:
        yield running


def request(ids=(3, 4, 5, 6), **changes):
    fields = {
        "input_ids": ids,
        "sampling_params": {"max_new_tokens": 0, "temperature": 0.7},
        "return_logprob": True,
        "logprob_start_len": 1,
    }
    return fields | changes


def test_answer_has_the_form_of_sglang(service, reference):
    answer = service.generate(request(top_logprobs_num=2, rid="mine", unknown=1)).json()
    assert (answer["text"], answer["output_ids"]) == ("", [])
    meta = answer["meta_info"]
    assert meta["id"] == "mine" and meta["finish_reason"] == {"type": "length", "length": 0}
    assert (meta["prompt_tokens"], meta["completion_tokens"]) == (4, 0)
    assert meta["output_token_logprobs"] == meta["output_top_logprobs"] == []
    first, *rest = meta["input_token_logprobs"]
    assert first == [None, 4, None]
    assert [entry[1:] for entry in rest] == [[5, None], [6, None]]
    logp_TV = reference(Trajectory(0, [3, 4], [5, 6]))  # at temperature 1, as SGLang's inputs are
    expected = [float(logp_TV[0, 5]), float(logp_TV[1, 6])]
    assert [entry[0] for entry in rest] == pytest.approx(expected, abs=1e-5)
    nothing, *rows = meta["input_top_logprobs"]
    assert nothing is None and [len(row) for row in rows] == [2, 2]
    assert rows[0][0][1:] == [int(logp_TV[0].argmax()), None]


def test_logprob_start_len_chooses_what_is_scored(service):
    def entries(**changes):
        return service.generate(request(**changes)).json()["meta_info"]["input_token_logprobs"]

    every = entries(logprob_start_len=0)
    assert len(every) == 4 and every[0] == [None, 3, None]
    first, last = entries(logprob_start_len=2)
    assert first == [None, 5, None] and last[1:] == every[3][1:] == [6, None]
    assert last[0] == pytest.approx(every[3][0], abs=1e-5)  # products of other shapes
    assert entries(logprob_start_len=3) == [[None, 6, None]]
    assert entries(logprob_start_len=-1) == entries(logprob_start_len=4) == []
    meta = service.generate(request(return_logprob=False)).json()["meta_info"]
    assert "input_token_logprobs" not in meta and meta["prompt_tokens"] == 4


def test_a_list_is_answered_in_order(service):
    body = request(
        [[3, 4, 5], [7, 8], [9]], logprob_start_len=[1, 0, 0], top_logprobs_num=[0, 1, 0]
    )
    answers = service.generate(body).json()
    ids = [[e[1] for e in a["meta_info"]["input_token_logprobs"]] for a in answers]
    assert ids == [[4, 5], [7, 8], [9]]
    assert ["input_top_logprobs" in a["meta_info"] for a in answers] == [False, True, False]


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (request(sampling_params={"max_new_tokens": 4}), "max_new_tokens must be 0"),
        (request(sampling_params={}), "max_new_tokens must be 0"),
        (request([3, 16]), "id 16 is outside the vocabulary of 16"),
        (request([3, -1]), "id -1 is outside the vocabulary of 16"),
        (request([]), "input_ids is empty"),
        (request([[3, 4], []]), "input_ids is empty"),
        (request([3] * 102), "has 102 ids, this server takes at most 101"),
        (request([[3] * 90] * 5), "450 tokens, at most 400 fit; split it"),
        (request(["a"]), "must be a list of token ids"),
        (request(None), "must be a list of token ids"),
        ({"text": "hello", "sampling_params": {"max_new_tokens": 0}}, "must be a list of token"),
        (request(logprob_start_len=-2), "logprob_start_len=-2 must be"),
        (request(logprob_start_len=[1, 2]), "logprob_start_len has 2 values for 1 sequences"),
        (request(top_logprobs_num=17), "top_logprobs_num=17 must be"),
        (request(logprob_temperature=0), "logprob_temperature"),
        (request(stream=True), "stream is not supported"),
        (b"{", "the body: Invalid JSON"),
        (b"[" * 100_000, "bytes; split it"),
    ],
)
def test_what_it_does_not_do_is_refused_with_one_sentence(body, words, service):
    response = service.generate(body)
    message = response.json()["error"]["message"]
    assert response.status_code == 400 and words in message
    assert "\n" not in message and message.endswith(".")
    assert service.generate(request()).status_code == 200


def test_it_tells_what_it_is(service):
    assert service.get("/health").status_code == service.get("/health_generate").status_code == 200
    info = service.get("/model_info").json()
    assert info == service.get("/get_model_info").json()
    assert (info["vocab_size"], info["eos_token_ids"], info["max_sequence_tokens"]) == (
        16,
        [1],
        101,
    )
    assert info["layout"]["tp"] == 1 and info["weight_version"] == "default"
    assert {"vocabulary", "special_tokens", "chat_template"} == info["tokenizer"].keys()
    state = service.get("/server_info").json()
    assert state["status"] == "ready" and state["tokens_in_flight"] == 0


def test_clients_that_leave_do_not_disturb_others(service, reference):
    """Some hang up while their request waits, some in its middle."""
    host, port = service.url.removeprefix("http://").split(":")
    body = json.dumps(request()).encode()
    head = f"POST /generate HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n\r\n".encode()
    for cut in [len(body), len(body) // 2, 0] * 4:
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(head + body[:cut])
    check(SAMPLES, ask([service.url])[0], reference)
    wait_until(lambda: service.get("/server_info").json()["tokens_in_flight"] == 0)


def test_a_full_queue_says_come_again_and_clients_do(reference):
    samples = make_samples([(20, 40)] * 10)
    with served(microbatch_tokens=64, max_queue_tokens=130, batch_ms=50) as service:
        answers = []

        def post(sample):
            ids = sample.prompt_ids + sample.response_ids
            answers.append(service.generate(request(ids)))

        threads = [threading.Thread(target=post, args=(sample,)) for sample in samples]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        refused = [a for a in answers if a.status_code == 503]
        assert {a.status_code for a in answers} == {200, 503}
        assert all(a.headers["retry-after"] == "1" for a in refused)
        scores, retries = ask([service.url], samples)
        check(samples, scores, reference)
        assert retries == 0  # waiting is no failure
        assert service.get("/server_info").json()["tokens_in_flight"] == 0


def test_deterministic_scores_do_not_depend_on_company():
    with served(deterministic=True, microbatch_tokens=200) as service:
        together, _ = ask([service.url])
        for sample, own in zip(SAMPLES, together, strict=True):
            alone, _ = ask([service.url], [sample])
            assert (alone[0].logp == own.logp).all()


def test_sigterm_drains_and_exits_with_zero(tmp_path):
    """The command itself: accepted requests are answered, new ones are refused."""
    port = free_port()
    command = [
        sys.executable,
        "-W",
        "ignore",
        "-m",
        "iwopd_megatron",
        "serve-teacher",
        "recipes/demo_tiny_moe.yaml",
        f"--port={port}",
        "teacher.service={batch_ms: 3000, parallel: {tp: 2}}",
    ]
    server = Server("teacher", command, None, tmp_path / "log", f"http://127.0.0.1:{port}")
    os.chdir(ROOT)
    server.start()
    try:
        server.wait_ready(120)
        answers = []

        def post():
            url = f"{server.url}/generate"
            answers.append(httpx.post(url, json=request(), timeout=30, trust_env=False))

        thread = threading.Thread(target=post)
        thread.start()
        info = lambda: httpx.get(f"{server.url}/server_info", trust_env=False).json()  # noqa: E731
        wait_until(lambda: info()["tokens_in_flight"] > 0)
        os.kill(server.process.pid, signal.SIGTERM)
        wait_until(lambda: server.health() == 503)
        url = f"{server.url}/generate"
        refused = httpx.post(url, json=request(), trust_env=False)
        assert refused.status_code == 503 and "draining" in refused.json()["error"]["message"]
        assert "retry-after" not in refused.headers
        thread.join()
        assert server.process.wait(60) == 0
    finally:
        server.kill()
    assert answers[0].status_code == 200
    assert "is served at" in (tmp_path / "log").read_text()


def test_queue_takes_the_oldest_and_its_like():
    queue = ScoringQueue(100)
    jobs = [ScoringJob([0] * n, 0, topk, 1.0) for n, topk in [(30, 0), (30, 2), (20, 0), (15, 0)]]
    queue.put(jobs)
    assert queue.take(50, 1, 0) == [jobs[0], jobs[2]]
    with pytest.raises(QueueFull):
        queue.put([ScoringJob([0] * 6, 0, 0, 1.0)])
    jobs[0].future.set_result(None)
    late = ScoringJob([0] * 35, 0, 2, 1.0)
    queue.put([late])
    assert queue.take(50, 1, 0) == [jobs[1]]
    assert jobs[3].future.cancel()  # its client is gone
    queue.close()
    with pytest.raises(QueueClosed):
        queue.put([ScoringJob([0], 0, 0, 1.0)])
    assert queue.take(10, 1, 0) == [late] and queue.is_empty
    assert queue.take(50, 0, 0) == []
    for job in (jobs[1], jobs[2], late):
        job.future.set_result(None)
    assert queue.tokens == 0
