"""One vLLM server: what it answers against transformers, and every way of giving it weights."""

import asyncio

import httpx
import pytest
from rig import IDS
from served_models import (
    hf_logp,
    hf_logp_of_versions,
    largest,
    overtaken,
    prompts,
    spoil_last_tensor,
)

from iwopd_megatron.errors import GateError, UserError
from iwopd_megatron.rollout.engine import Sampling
from iwopd_megatron.rollout.server import ServerLost


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_answers_carry_the_log_probs_of_the_whole_distribution(rig, temperature):
    engine, model = rig.engine("tensor"), rig.model(rig.weights())
    engine.update(rig.weights().items(), 0)
    samples = engine.generate(prompts(12), Sampling(40, temperature))
    assert [sample.index for sample in samples] == list(range(12))
    for sample in samples:
        ids = sample.prompt_ids + sample.response_ids
        expected = hf_logp(model, ids, len(sample.prompt_ids), temperature)
        assert largest(expected, sample.rollout_logp) < 1e-4
        assert sample.truncated == (sample.response_ids[-1] != 1)
        assert 1 not in sample.response_ids[:-1]
        assert not sample.truncated or len(sample.response_ids) == 40
    assert any(sample.truncated for sample in samples) or rig.hf.model_type == "qwen3_moe"
    assert any(not sample.truncated for sample in samples)


def test_a_seed_fixes_an_answer(rig):
    (prompt,) = prompts(1)
    asked = [Sampling(20, seed=seed).rest(prompt, 0) for seed in (1, 1, 2)]
    same, again, other = [rig.run(rig.server.generate(IDS, sampling)) for sampling in asked]
    assert same == again
    assert same.ids != other.ids


def test_cut_distributions_have_no_log_probs(dense):
    """vLLM renormalises over the tokens that top_p leaves, which is not what a loss needs."""
    greedy = dense.run(dense.server.generate(IDS, Sampling(10, temperature=0.0)))
    cut = dense.run(dense.server.generate(IDS, Sampling(10, top_p=1e-6)))
    assert cut.ids == greedy.ids and cut.logp == [] and len(greedy.logp) == len(greedy.ids)


def test_an_id_outside_the_vocabulary_never_reaches_the_server(dense):
    for ids in ([3, 16], [-1], []):
        with pytest.raises(UserError, match="outside the vocabulary of 16"):
            dense.run(dense.server.generate(ids, Sampling(4)))
        with pytest.raises(UserError, match="outside the vocabulary of 16"):
            dense.run(dense.server.prompt_logps(ids))


@pytest.mark.parametrize("sync", ["disk", "tensor", "distributed"])
def test_weights_land_and_are_proven_to(rig, sync):
    """Twice, so that a group and a folder are used again; every tensor's checksum is compared."""
    engine = rig.engine(sync)
    for version in (1, 2):
        weights = rig.weights(seed=10 * version)
        engine.canary = rig.probe(weights)
        engine.update(weights.items(), version)
        (found,) = rig.run(rig.server.checksums())
        assert found.keys() == weights.keys()
        (sample,) = engine.generate(prompts(1), Sampling(5))
        ids = sample.prompt_ids + sample.response_ids
        expected = hf_logp(rig.model(weights), ids, len(sample.prompt_ids))
        assert largest(expected, sample.rollout_logp) < 1e-4
        assert sample.weight_version == version


def test_a_tensor_that_did_not_land_is_noticed(rig):
    """The server gets another last tensor than the one that was believed sent."""
    engine = rig.engine("tensor")
    spoil_last_tensor(rig.push)
    with pytest.raises(GateError, match="does not hold the weights it was sent: 1 tensors"):
        engine.update(rig.weights(seed=5).items(), 3)


def test_weights_that_are_missing_or_cut_off_never_count(rig):
    """An update without a tensor fails; the next one starts afresh where another broke off."""
    server, weights = rig.client(), rig.weights(seed=6)
    rig.run(server.begin_update())
    rig.run(server.send([item for item in weights.items() if item[0] != "model.norm.weight"]))
    with pytest.raises(ServerLost, match="no weights came for 1 tensors, e.g. model.norm"):
        rig.run(server.end_update(8))
    info = httpx.get(server.url + "/weight_info", trust_env=False)
    assert info.json() == {"weight_version": "updating"}
    engine = rig.engine("tensor")
    engine.canary = rig.probe(weights)
    engine.update(weights.items(), 9)


def test_the_canary_notices_experts_that_were_not_packed(moe):
    """vLLM's own reload leaves a CPU's experts unpacked, without an error."""
    weights = moe.weights()
    engine = moe.engine("tensor", moe.probe(weights))
    engine.update(weights.items(), 1)

    async def reload(version: int) -> None:
        folder = {"weights_path": str(moe.folder)}
        await moe.server._post("/collective_rpc", method="reload_weights", kwargs=folder)

    moe.server.end_update, moe.server.send = reload, lambda tensors: asyncio.sleep(0)
    moe.server.begin_update = lambda: asyncio.sleep(0)
    moe.server.checksums = lambda: asyncio.sleep(0, moe.controller.fingerprints[1].ranks)
    try:
        with pytest.raises(GateError, match="canary"):
            engine.update(weights.items(), 2)
    finally:
        moe.server = moe.client()
    engine = moe.engine("tensor", engine.canary)
    engine.update(weights.items(), 3)


@pytest.mark.parametrize("mode", ["retract", "in_place"])
def test_answers_in_flight_go_on_under_new_weights(dense, mode):
    """Tokens name the version that wrote them; only `in_place` keeps what old weights cached."""
    server = dense.client(pause_mode=mode)
    server.eos_ids = []
    weights = dense.weights(seed=1), dense.weights(seed=2)
    models = [dense.model(each) for each in weights]

    async def push(version: int) -> None:
        await server.pause()
        await server.begin_update()
        await server.send(list(weights[version % 2].items()))
        await server.end_update(version)
        await server.resume()

    async def ask(prompt, tokens: int):
        return await server.generate(prompt.ids, Sampling(tokens))

    for prompt, answer in dense.run(overtaken(ask, push)):
        expected = hf_logp_of_versions(models, prompt, answer)
        count = answer.versions.count(answer.versions[0])  # tokens before new weights came
        assert largest(expected[:count], answer.logp[:count]) < 1e-4
        if mode == "retract":
            assert largest(expected, answer.logp) < 1e-4
        elif count < len(answer.ids):
            assert largest(expected, answer.logp) > 1e-3  # what the old weights cached
