"""The scoring client against real servers that hang, die, cut connections and answer wrongly."""

import asyncio
import json
import os
import signal
import time

import numpy
import pytest
from served import served, spoiled
from test_teacher_service import SAMPLES, ask

from iwopd_megatron.batch.trajectory import Trajectory
from iwopd_megatron.errors import GateError, ServiceError
from iwopd_megatron.runtime.background import Background
from iwopd_megatron.runtime.services import free_port
from iwopd_megatron.teacher.retry import ScoringClient
from iwopd_megatron.teacher.scoring_protocol import BadAnswer, read_answer


@pytest.fixture(scope="module")
def service():
    with served(deterministic=True) as running:
        yield running


@pytest.fixture(scope="module")
def undisturbed(service):
    return ask([service.url])[0]


def same(ours, theirs):
    assert all((a.logp == b.logp).all() for a, b in zip(ours, theirs, strict=True))


def edited(change):
    """Spoils the first three answers by editing their meta_info."""

    def spoil(n, content):
        answer = json.loads(content)
        if n < 3:
            change(answer["meta_info"])
        return 200, json.dumps(answer).encode()

    return spoil


def shift(meta):
    meta["input_token_logprobs"] = meta["input_token_logprobs"][1:] + [[-1.0, 3, None]]


SPOILERS = {
    "cut in the middle": lambda n, content: (200, None if n < 3 else content),
    "server error": lambda n, content: (500 if n < 3 else 200, content),
    "no JSON": lambda n, content: (200, b"<html>" if n < 3 else content),
    "no object": lambda n, content: (200, b"[]" if n < 3 else content),
    "shifted ids": edited(shift),
    "one short": edited(lambda meta: meta["input_token_logprobs"].pop()),
    "null": edited(lambda meta: meta["input_token_logprobs"][-1].__setitem__(0, None)),
    "no scores": edited(lambda meta: meta.pop("input_token_logprobs")),
    "another prompt": edited(lambda meta: meta.update(prompt_tokens=1)),
}


@pytest.mark.parametrize("spoiler", SPOILERS)
def test_spoiled_answers_are_asked_for_again(spoiler, service, undisturbed):
    with spoiled(service.url, SPOILERS[spoiler]) as url:
        scores, retries = ask([url])
    same(scores, undisturbed)
    assert retries == 3


def test_another_server_takes_over(service, undisturbed):
    with spoiled(service.url, lambda n, content: (500, content)) as broken:
        same(ask([broken, service.url])[0], undisturbed)


def test_it_gives_up_with_one_sentence(service):
    with spoiled(service.url, lambda n, content: (500, b'{"error": "no memory"}')) as broken:
        with pytest.raises(ServiceError, match=r"in 5 attempts; .* answered 500: no memory\.$"):
            ask([broken], SAMPLES[:1])
    with pytest.raises(ServiceError, match="no teacher has answered for 1 seconds"):
        ask([f"http://127.0.0.1:{free_port()}"], SAMPLES[:1], patience_s=1)


def test_patience_is_of_one_sample_not_of_those_before_it(service, undisturbed):
    """Every sample is told once to come again; all of them together take longer than patience."""
    with spoiled(service.url, lambda n, content: (200 if n % 2 else 503, content)) as url:
        scores, retries = ask([url], SAMPLES[:5], max_in_flight=1, patience_s=3)
    same(scores, undisturbed[:5])
    assert retries == 0


def test_a_refusal_is_final(service):
    sample = Trajectory(0, [3] * 100, [4] * 100)
    with pytest.raises(ServiceError, match="refuses a sample: input_ids has 200 ids"):
        ask([service.url], [sample])
    with pytest.raises(GateError, match="outside the vocabulary of 16"):
        ask([service.url], [Trajectory(0, [3], [16])])


def test_a_server_without_temperature_is_not_believed(service):
    plain = edited(lambda meta: meta.pop("logprob_temperature"))
    with spoiled(service.url, plain) as url:
        assert ask([url], SAMPLES[:2], temperature=0.7)[1] == 3
    with spoiled(service.url, plain) as url:
        assert ask([url], SAMPLES[:2])[1] == 0


def test_a_hanging_server_is_left_alone_until_it_answers(service, undisturbed):
    with served(deterministic=True) as other:
        os.kill(other.pids[0], signal.SIGSTOP)
        scores, retries = ask([other.url, service.url], timeout_s=1)
        same(scores, undisturbed)
        assert retries > 0
        os.kill(other.pids[0], signal.SIGCONT)
        same(ask([other.url])[0], undisturbed)


def test_the_other_server_finishes_what_a_killed_one_began(service, undisturbed):
    with pytest.raises(Exception, match="SIGKILL"), served(batch_ms=2000) as other:

        async def run():
            client = ScoringClient([other.url, service.url], 16)
            tasks = [asyncio.create_task(client.score_sample(sample)) for sample in SAMPLES]
            while not client.endpoints[0].in_flight:
                await asyncio.sleep(0.01)
            os.kill(other.pids[0], signal.SIGKILL)
            return await asyncio.gather(*tasks), client.retries

        scores, retries = asyncio.run(run())
        same(scores, undisturbed)
        assert retries > 0


def test_a_server_that_comes_back_with_another_model_is_not_asked(service):
    """After its failure it says it holds other weights."""

    async def run(url):
        client = ScoringClient([url], 16, patience_s=2)
        await client.describe()
        client.endpoints[0].info["config_fingerprint"] = "another"
        with pytest.raises(ServiceError, match="no teacher has answered"):
            await client.score_sample(SAMPLES[0])
        await client.close()

    with spoiled(service.url, lambda n, content: (500, content)) as url:
        asyncio.run(run(url))


def test_at_most_max_in_flight_are_asked_at_a_time(service):
    async def run():
        client, most = ScoringClient([service.url], 16, max_in_flight=2), 0
        tasks = [asyncio.create_task(client.score_sample(sample)) for sample in SAMPLES]
        while not all(task.done() for task in tasks):
            most = max(most, client.endpoints[0].in_flight)
            await asyncio.sleep(0)
        await client.close()
        return most

    assert asyncio.run(run()) == 2


def test_top_k_must_be_complete_and_inside_the_vocabulary():
    entries = [[None, 4, None], [-1.0, 5, None]]

    def read(row, vocab_size=16):
        meta = {"prompt_tokens": 2, "input_token_logprobs": entries}
        meta["input_top_logprobs"] = [None, row]
        return read_answer({"meta_info": meta}, [4, 5], 0, 2, 1.0, vocab_size)

    good = [[-0.5, 7, None], [-1.0, 5, None]]
    assert read(good).topk_ids.tolist() == [[7, 5]]
    assert read(good).topk_logp.dtype == numpy.float32
    for bad in (good[:1], None, [[None, 7, None], good[1]], [[-0.5, "7", None], good[1]], [1, 2]):
        with pytest.raises(BadAnswer):
            read(bad)
    with pytest.raises(BadAnswer, match="outside the vocabulary of 7"):
        read(good, 7)


def test_the_last_id_may_be_called_zero_and_no_other():
    """As SGLang does."""

    def read(sent, echoed):
        meta = {"prompt_tokens": 2, "input_token_logprobs": [[None, 4, None], [-1.0, echoed, None]]}
        return read_answer({"meta_info": meta}, [4, sent], 0, 0, 1.0, 16)

    assert read(15, 0).logp.tolist() == read(15, 15).logp.tolist() == [-1.0]
    for sent, echoed in [(14, 0), (0, 15), (15, 1)]:
        with pytest.raises(BadAnswer, match=f"scored id {echoed} where {sent} was sent"):
            read(sent, echoed)


def test_background_runs_coroutines_from_any_thread_and_cancels_at_the_end():
    background = Background()
    assert background.submit(asyncio.sleep(0, "done")).result(5) == "done"
    with pytest.raises(ZeroDivisionError):
        background.submit(_fail()).result(5)
    begin = time.monotonic()
    endless = background.submit(asyncio.sleep(1000))
    background.close()
    background.close()
    assert endless.cancelled() and time.monotonic() - begin < 100


async def _fail():
    return 1 / 0
