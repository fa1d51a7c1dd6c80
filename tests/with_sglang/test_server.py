"""One SGLang server: what it answers against transformers, and every way of giving it weights."""

import asyncio

import pytest
import torch
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

MODELS = ["moe", "dense"]


@pytest.fixture(params=MODELS)
def rig(request):
    return request.getfixturevalue(request.param)


@pytest.mark.parametrize("settings", [(1.0, 1.0), (0.7, 1.0), (1.0, 0.8), (0.0, 1.0)], ids=str)
def test_answers_carry_the_log_probs_of_the_whole_distribution(rig, settings):
    temperature, top_p = settings
    engine, model = rig.engine("tensor"), rig.model()
    engine.update(rig.weights().items(), 0)
    samples = engine.generate(prompts(12), Sampling(40, temperature, top_p))
    assert [sample.index for sample in samples] == list(range(12))
    for sample in samples:
        ids = sample.prompt_ids + sample.response_ids
        expected = hf_logp(model, ids, len(sample.prompt_ids), temperature or 1.0)
        assert largest(expected, sample.rollout_logp) < 1e-4
        assert sample.truncated == (sample.response_ids[-1] != 1)
        assert len(sample.response_ids) == 40 or not sample.truncated
        if temperature == 0:
            logits = model(torch.tensor([ids])).logits[0, len(sample.prompt_ids) - 1 : -1]
            assert logits.argmax(-1).tolist() == sample.response_ids


def test_an_id_outside_the_vocabulary_never_reaches_the_server(rig):
    for ids in ([3, 16], [-1], []):
        with pytest.raises(UserError, match="outside the vocabulary of 16"):
            rig.run(rig.server.generate(ids, Sampling(4)))
    assert rig.run(rig.server.is_alive())


@pytest.mark.parametrize("sync", ["disk", "tensor", "distributed"])
def test_weights_land_and_are_proven_to(rig, sync):
    """Twice, so that a group and a folder are used again; every tensor's checksum is compared."""
    engine = rig.engine(sync)
    for version in (1, 2):
        weights = rig.weights(seed=10 * version)
        engine.update(weights.items(), version)
        assert rig.controller.proven == version
        ids = [5, 9, 4, 7, 11, 3, 6]
        expected = hf_logp(rig.model(weights), ids, 1)
        assert largest(expected, rig.run(rig.server.prompt_logps(ids))) < 1e-5
        (sample,) = engine.generate(prompts(1), Sampling(5))
        assert sample.weight_version == version
    folders = sorted(path.name for path in (rig.out / "weights").glob("*"))
    assert sync != "disk" or folders == ["v2"]


def test_a_tensor_that_did_not_land_is_noticed(rig):
    """The server gets another last tensor than the one that was believed sent."""
    engine = rig.engine("tensor")
    spoil_last_tensor(rig.push)
    with pytest.raises(GateError, match="does not hold the weights it was sent: 1 tensors"):
        engine.update(rig.weights(seed=5).items(), 3)


def test_answers_in_flight_go_on_under_new_weights(rig):
    """Every token names the version that wrote it, and has that version's log-prob."""
    engine, weights = rig.engine("tensor"), (rig.weights(seed=1), rig.weights(seed=2))
    models = [rig.model(each) for each in weights]
    eos, rig.server.eos_ids = rig.server.eos_ids, []

    async def push(version: int) -> None:
        await asyncio.to_thread(engine.update, weights[version % 2].items(), version)

    async def ask(prompt, tokens: int):
        return await rig.server.generate(prompt.ids, Sampling(tokens, top_p=0.99))

    answers = rig.loop.submit(overtaken(ask, push)).result(300)
    rig.server.eos_ids = eos
    for prompt, answer in answers:
        assert largest(hf_logp_of_versions(models, prompt, answer), answer.logp) < 1e-4
