"""SGLang loads a folder that went through a Megatron checkpoint, and scores as the source does."""

import pytest
from served_models import ROOT, hf_logp, largest, prompts
from support import Rig

from iwopd_megatron.weights import shards
from iwopd_megatron.weights.convert import hf_to_megatron, megatron_to_hf


@pytest.fixture(params=["moe", "dense"])
def folder(request, dense_folder):
    return ROOT / "recipes/demo/student" if request.param == "moe" else dense_folder


def test_scores_are_those_of_the_source(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "SHARD_BYTES", 100_000)
    checkpoint, exported = tmp_path / "checkpoint", tmp_path / "hf"
    hf_to_megatron(folder, checkpoint)
    megatron_to_hf(checkpoint, exported, folder)
    assert len(list(exported.glob("*.safetensors"))) > 1
    with Rig(exported, tmp_path / "server") as rig:
        rig.folder = folder
        model = rig.model()
        for prompt in prompts(6):
            ids = prompt.ids + [5, 9, 4, 7]
            assert largest(rig.run(rig.server.prompt_logps(ids)), hf_logp(model, ids, 1)) < 1e-4
