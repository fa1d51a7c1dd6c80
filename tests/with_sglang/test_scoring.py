"""A real SGLang server as a teacher: the same scores as `iwopd serve-teacher`, the same client."""

import asyncio

import httpx
import numpy
import pytest
from served import ROOT, TEACHER, served
from test_teacher_service import SAMPLES, ask, request

from iwopd_megatron.errors import ServiceError
from iwopd_megatron.hf.fingerprint import identity, with_identity
from iwopd_megatron.runtime.services import Server, free_port, outer_environment
from iwopd_megatron.teacher.retry import ScoringClient

ENVIRONMENT = ROOT / "tests/with_sglang/environment"
PYTHON = ROOT / "build/sglang-venv/bin/python"
pytestmark = pytest.mark.skipif(not PYTHON.exists(), reason="make test-sglang builds it")


@pytest.fixture(scope="module")
def sglang(tmp_path_factory):
    port = free_port()
    command = [
        PYTHON,
        "-m",
        "sglang.launch_server",
        f"--model-path={TEACHER}",
        "--device=cpu",
        "--attention-backend=torch_native",
        "--dtype=float32",
        "--max-total-tokens=8192",
        "--sleep-on-idle",
        "--host=127.0.0.1",
        f"--port={port}",
    ]
    own = {"SGLANG_USE_CPU_ENGINE": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ENVIRONMENT)}
    log = tmp_path_factory.mktemp("sglang") / "log"
    server = Server("SGLang", command, outer_environment() | own, log, f"http://127.0.0.1:{port}")
    server.start()
    server.wait_ready(400)
    yield server
    server.stop()


@pytest.fixture(scope="module")
def ours():
    with served() as service:
        yield service


def test_both_score_alike(sglang, ours):
    """Ids of the whole vocabulary, its last one included, and the likeliest of each position."""
    theirs, retries = ask([sglang.url], topk=4)
    own, _ = ask([ours.url], topk=4)
    assert retries == 0
    for a, b in zip(theirs, own, strict=True):
        numpy.testing.assert_allclose(a.logp, b.logp, atol=5e-5)
        numpy.testing.assert_allclose(a.topk_logp, b.topk_logp, atol=5e-5)
        assert (a.topk_ids == b.topk_ids).mean() > 0.99  # near ties


@pytest.mark.parametrize("changes", [{}, {"logprob_start_len": -1}, {"logprob_start_len": 4}])
def test_both_answer_in_the_same_form(changes, sglang, ours):
    body = request(top_logprobs_num=2, **changes)
    both = [
        httpx.post(f"{url}/generate", json=body, trust_env=False).json()
        for url in (sglang.url, ours.url)
    ]
    assert both[0].keys() == both[1].keys()
    theirs, own = (answer["meta_info"] for answer in both)
    assert own.keys() - {"logprob_temperature"} <= theirs.keys()
    for key in ("finish_reason", "prompt_tokens", "completion_tokens", "output_token_logprobs"):
        assert own[key] == theirs[key]
    for key in ("input_token_logprobs", "input_top_logprobs"):
        assert shape(own[key]) == shape(theirs[key])


def shape(value):
    """Where the lists, nulls and ids of an answer are."""
    if isinstance(value, list):
        return [shape(part) for part in value]
    return "number" if isinstance(value, float) else value


def test_another_temperature_is_noticed(sglang):
    with pytest.raises(ServiceError, match="log-probs are not at temperature 0.7"):
        ask([sglang.url], SAMPLES[:1], temperature=0.7)


def test_its_model_is_known_by_its_folder(sglang):
    from transformers import AutoTokenizer

    async def describe():
        client = ScoringClient([sglang.url], 16)
        found = await client.describe()
        await client.close()
        return found[sglang.url]

    info = with_identity(asyncio.run(describe()))
    assert info.items() >= identity(TEACHER, AutoTokenizer.from_pretrained(TEACHER)).items()
