"""A vLLM server that dies or comes back with other weights: nothing lost, nothing twice."""

import os
import signal
import time

from served_models import hf_logp, largest, prompts

from iwopd_megatron.rollout.engine import Sampling


def test_a_killed_server_comes_back_and_every_prompt_is_answered_once(moe):
    engine, weights = moe.engine("disk", is_ours=True), moe.weights(seed=7)
    engine.update(weights.items(), 1)
    asked, first, seen = prompts(64), moe.process.process, []

    def kill(sample) -> None:
        seen.append(sample.index)
        if len(seen) == 5:
            os.killpg(first.pid, signal.SIGKILL)

    samples = engine.generate(asked, Sampling(100), kill)
    assert sorted(seen) == [sample.index for sample in samples] == list(range(64))
    assert moe.process.process is not first
    assert any("lost" in line for line in moe.said) and any("is back" in line for line in moe.said)
    model = moe.model(weights)
    for sample in samples:
        ids = sample.prompt_ids + sample.response_ids
        assert sample.weight_version == 1
        assert largest(hf_logp(model, ids, len(sample.prompt_ids)), sample.rollout_logp) < 1e-4


def test_a_server_restarted_with_old_weights_is_noticed(dense):
    """Nobody saw it go: it answers at once, under the weights it started with."""
    engine, weights = dense.engine("disk"), dense.weights(seed=8)
    engine.update(weights.items(), 3)
    first = dense.process.process
    os.killpg(first.pid, signal.SIGKILL)
    while dense.process.process is first or not dense.run(dense.server.is_alive()):
        time.sleep(0.5)
    samples = engine.generate(prompts(8), Sampling(30))
    assert any("answered under weights ['default'], not 3" in line for line in dense.said)
    model = dense.model(weights)
    for sample in samples:
        ids = sample.prompt_ids + sample.response_ids
        assert sample.weight_version == 3
        assert largest(hf_logp(model, ids, len(sample.prompt_ids)), sample.rollout_logp) < 1e-4
