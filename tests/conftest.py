"""One thread, no GPU unless CUDA_VISIBLE_DEVICES names one, and tiny Hugging Face folders."""

import os

os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")  # the tests fork, and expect gloo and fp32
os.environ["TRITON_INTERPRET"] = "1"  # kernels on CPUs; read when triton is first imported

import torch

torch.set_num_threads(1)

import json
from importlib.metadata import distributions
from pathlib import Path

import pytest
from variants import VARIANTS

from iwopd_megatron.hf.families import FAMILIES
from iwopd_megatron.parity.rehearse import write_model
from iwopd_megatron.runtime import versions

ROOT = Path(__file__).parents[1]

SHAPE = dict(
    vocab_size=512,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=256,
    rms_norm_eps=1e-6,
    pad_token_id=300,
)
EXPERTS = dict(num_experts=8, num_experts_per_tok=2, moe_intermediate_size=32)


def pytest_sessionfinish(session):
    """Add what was run, with which versions, to the file that TESTED_LOG names (make support)."""
    log, config = os.environ.get("TESTED_LOG"), session.config
    if not log or hasattr(config, "workerinput"):
        return
    stats = config.pluginmanager.get_plugin("terminalreporter").stats
    passed, failed, errors = (len(stats.get(k, [])) for k in ("passed", "failed", "error"))
    first = Path(config.args[0])
    suite = os.environ.get("TESTED_SUITE") or (first if first.is_dir() else first.parent).name
    beside = {}  # the server of a suite that has one
    for package in distributions(path=map(str, ROOT.glob(f"build/{suite[5:]}-venv/lib/*/site-*"))):
        beside[versions.SAME_CODE.get(package.name, package.name)] = package.version
    servers = {name: beside[name] for name in versions.SERVERS if name in beside}
    run = versions.recorded(passed, failed + errors, suite, servers)
    with open(log, "a") as file:
        file.write(json.dumps(run) + "\n")


def _write_folder(folder: Path, **settings) -> Path:
    write_model(folder, SHAPE | settings)
    return folder


@pytest.fixture(scope="module")
def in_the_repository():
    """Recipes name their files relative to the repository."""
    before = Path.cwd()
    os.chdir(Path(__file__).parents[1])
    yield
    os.chdir(before)


@pytest.fixture(scope="session")
def moe_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("hf") / "moe"
    return _write_folder(folder, **EXPERTS, norm_topk_prob=True)


@pytest.fixture(scope="session")
def moe_no_norm_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("hf") / "moe_no_norm"
    return _write_folder(folder, **EXPERTS, norm_topk_prob=False)


@pytest.fixture(scope="session")
def dense_folder(tmp_path_factory) -> Path:
    return _write_folder(tmp_path_factory.mktemp("hf") / "dense", tie_word_embeddings=False)


@pytest.fixture(scope="session")
def family_folders(tmp_path_factory) -> dict[str, Path]:
    """A small model of every family, and VARIANTS; every second one has tied embeddings."""
    place, models = tmp_path_factory.mktemp("families"), dict.fromkeys(FAMILIES, {}) | VARIANTS
    for i, (name, settings) in enumerate(models.items()):
        model_type = name.split()[0]
        kind = {"model_type": model_type, "tie_word_embeddings": i % 2 == 1}
        write_model(place / name, dict(FAMILIES[model_type].sample) | kind | settings)
    return {name: place / name for name in models}


# Contexts stretched from 16 tokens, so that every kind turns the tests' short sequences otherwise.
ROTARY = {
    "linear": {"rope_type": "linear", "factor": 3.0},
    "llama3": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
}  # fmt: skip


@pytest.fixture(scope="session")
def rotary_folders(tmp_path_factory) -> dict[str, Path]:
    """A dense model with scaled rotary positions of every kind."""
    place = tmp_path_factory.mktemp("rotary")
    return {
        kind: _write_folder(place / kind, rope_parameters=settings | {"rope_theta": 1e4})
        for kind, settings in ROTARY.items()
    }


@pytest.fixture(scope="session")
def tied_folder(tmp_path_factory) -> Path:
    return _write_folder(tmp_path_factory.mktemp("hf") / "tied", tie_word_embeddings=True)
