"""SGLang serves every family, scores as transformers does, and takes weights that land."""

import pytest
from served_models import hf_logp, largest, prompts, write_family
from support import Rig

from iwopd_megatron.rollout.engine import Sampling

# Qwen3's are in every other file
FAMILIES = ["llama", "qwen2", "mistral"]


@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_family_is_served(model_type, tmp_path):
    folder = write_family(tmp_path / "hf", model_type)
    with Rig(folder, tmp_path / "server") as rig:
        for version, weights in enumerate([rig.weights(), rig.weights(seed=10)]):
            engine, model = rig.engine("tensor"), rig.model(weights)
            engine.update(weights.items(), version)
            assert rig.controller.proven == version
            for prompt in prompts(6):
                ids = prompt.ids + [5, 9, 4, 7]
                found = rig.run(rig.server.prompt_logps(ids))
                assert largest(found, hf_logp(model, ids, 1)) < 1e-4
            for sample in engine.generate(prompts(6), Sampling(20)):
                ids = sample.prompt_ids + sample.response_ids
                expected = hf_logp(model, ids, len(sample.prompt_ids))
                assert largest(expected, sample.rollout_logp) < 1e-4
                assert sample.weight_version == version
