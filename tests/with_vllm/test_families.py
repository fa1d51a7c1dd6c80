"""vLLM serves every family, scores as transformers does, and takes weights that land."""

import pytest
from rig import Rig
from served_models import check_family_served, write_family

# Qwen3's are in every other file
FAMILIES = ["llama", "qwen2", "mistral", "qwen2_moe", "glm4_moe"]


@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_family_is_served(model_type, tmp_path):
    folder = write_family(tmp_path / "hf", model_type)
    rig = Rig(folder, tmp_path / "server")
    try:
        rig.run(rig.server.wait_ready())
        for version, weights in enumerate([rig.weights(), rig.weights(seed=10)]):
            engine, model = rig.engine("tensor"), rig.model(weights)
            engine.canary = rig.probe(weights)
            engine.update(weights.items(), version)
            (found,) = rig.run(rig.server.checksums())
            assert found.keys() == weights.keys()
            check_family_served(rig, engine, model, version)
    finally:
        rig.stop()
