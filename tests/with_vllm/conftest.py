"""Two real vLLM servers on this machine's CPU, dense and MoE, shared by the tests of a session.

They run in an environment of their own, build/vllm-venv, which `make test-vllm` builds.
"""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # served_models.py

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["CUDA_VISIBLE_DEVICES"] = ""

import pytest
import torch
from rig import Rig
from served_models import STUDENT, write_dense

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def rigs(tmp_path_factory):
    """By name; they start at the same time."""
    folder = tmp_path_factory.mktemp("vllm")
    rigs = {
        "moe": Rig(STUDENT, folder / "moe"),
        "dense": Rig(write_dense(folder / "hf", head_dim=32), folder / "dense"),
    }
    try:
        for rig in rigs.values():
            _ready(rig)
        yield rigs
    finally:
        for rig in rigs.values():
            rig.stop()


def _ready(rig: Rig) -> Rig:
    rig.run(rig.server.wait_ready())
    return rig


@pytest.fixture(params=["moe", "dense"])
def rig(request, rigs):
    return _ready(rigs[request.param])


@pytest.fixture
def moe(rigs):
    return _ready(rigs["moe"])


@pytest.fixture
def dense(rigs):
    return _ready(rigs["dense"])
