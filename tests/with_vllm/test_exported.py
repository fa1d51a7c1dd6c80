"""vLLM loads a folder that went through a Megatron checkpoint, and scores as the source does."""

import pytest
from rig import Rig
from served_models import STUDENT, hf_logp, largest, prompts, write_dense

from iwopd_megatron.weights import shards
from iwopd_megatron.weights.convert import hf_to_megatron, megatron_to_hf


@pytest.mark.parametrize("kind", ["moe", "dense"])
def test_scores_are_those_of_the_source(kind, tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "SHARD_BYTES", 100_000)
    folder = STUDENT if kind == "moe" else write_dense(tmp_path / "source", head_dim=32)
    checkpoint, exported = tmp_path / "checkpoint", tmp_path / "hf"
    hf_to_megatron(folder, checkpoint)
    megatron_to_hf(checkpoint, exported, folder)
    assert len(list(exported.glob("*.safetensors"))) > 1
    rig = Rig(exported, tmp_path / "server")
    try:
        rig.run(rig.server.wait_ready())
        rig.folder = folder
        model = rig.model(rig.weights())
        for prompt in prompts(6):
            ids = prompt.ids + [5, 9, 4, 7]
            assert largest(rig.run(rig.server.prompt_logps(ids)), hf_logp(model, ids, 1)) < 1e-4
    finally:
        rig.stop()
