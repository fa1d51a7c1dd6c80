"""Real SGLang servers on this machine's CPU, one a model, shared by the tests of a session.

They run in an environment of their own, build/sglang-venv, which `make test-sglang` builds.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # served_models.py

import pytest
from served_models import STUDENT, write_dense
from support import Rig


@pytest.fixture(scope="session")
def dense_folder(tmp_path_factory) -> Path:
    return write_dense(tmp_path_factory.mktemp("hf") / "dense", head_dim=16)


@pytest.fixture(scope="session")
def moe(tmp_path_factory):
    with Rig(STUDENT, tmp_path_factory.mktemp("moe")) as rig:
        yield rig


@pytest.fixture(scope="session")
def dense(tmp_path_factory, dense_folder):
    with Rig(dense_folder, tmp_path_factory.mktemp("dense")) as rig:
        yield rig
