"""Real SGLang servers on this machine's CPU, one a model, shared by the tests of a session.

They run in an environment of their own, build/sglang-venv, which `make test-sglang` builds.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # worlds.py

import pytest  # noqa: E402
import torch  # noqa: E402
from support import ROOT, Rig, copy_tokenizer  # noqa: E402

STUDENT = ROOT / "recipes/demo/student"


@pytest.fixture(scope="session")
def dense_folder(tmp_path_factory) -> Path:
    """A tiny dense model with the demo's tokenizer."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    folder = tmp_path_factory.mktemp("hf") / "dense"
    torch.manual_seed(3)
    config = Qwen3Config(
        vocab_size=16, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, max_position_embeddings=256,
        initializer_range=0.3, tie_word_embeddings=True, eos_token_id=1,
    )  # fmt: skip
    Qwen3ForCausalLM(config).save_pretrained(folder)
    copy_tokenizer(STUDENT, folder)
    return folder


@pytest.fixture(scope="session")
def moe(tmp_path_factory):
    with Rig(STUDENT, tmp_path_factory.mktemp("moe")) as rig:
        yield rig


@pytest.fixture(scope="session")
def dense(tmp_path_factory, dense_folder):
    with Rig(dense_folder, tmp_path_factory.mktemp("dense")) as rig:
        yield rig
