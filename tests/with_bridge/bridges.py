"""Starts the two bridges' own programs in their environment, and writes the models they convert."""

import json
import os
import subprocess
from pathlib import Path

from safetensors.torch import load_file, save_file

from iwopd_megatron.parity.rehearse import write_model

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
PYTHON = ROOT / "build/bridge-venv/bin/python"
PROGRAMS = {
    "megatron-bridge": HERE / "megatron_bridge.py",
    "mcore-bridge": HERE / "ms_swift.py",
}
SHAPE = dict(
    vocab_size=512,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
    max_position_embeddings=256,
    rms_norm_eps=1e-6,
    initializer_range=0.03,
)
EXPERTS = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32)
# Bridge needs all of them, also those that have a default in transformers.
YARN = dict(
    rope_type="yarn",
    factor=4.0,
    original_max_position_embeddings=64,
    rope_theta=1e6,
    beta_fast=32.0,
    beta_slow=1.0,
    truncate=True,
)
MODELS = {
    "moe": SHAPE | EXPERTS | dict(norm_topk_prob=True, rope_parameters=YARN),
    "dense": SHAPE | dict(tie_word_embeddings=False),
    "tied": SHAPE | dict(tie_word_embeddings=True),
}


def write_hf(folder: Path, name: str) -> Path:
    """A bf16 folder of one of MODELS, with the demo's tokenizer."""
    write_model(folder, MODELS[name])
    tensors = {key: x.bfloat16() for key, x in load_file(folder / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text()) | {"dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(config))
    for file in (ROOT / "recipes/demo/student").glob("tokenizer*"):
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def start(program: str, jobs: list[list[Path | str]]) -> subprocess.Popen:
    """A program that has imported everything, and does its jobs when a line is sent."""
    environment = os.environ | {
        "PYTHONPATH": f"{ROOT}:{HERE / 'environment'}",
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    text = json.dumps([[str(x) for x in job] for job in jobs])
    command = [PYTHON, "-W", "ignore", PROGRAMS[program], text]
    pipe = subprocess.PIPE
    child = subprocess.Popen(
        command, stdin=pipe, stdout=pipe, stderr=subprocess.STDOUT, text=True, env=environment
    )
    seen = []
    for line in child.stdout:
        seen.append(line)
        if line == "ready\n":
            return child
    raise RuntimeError("".join(seen[-30:]))


def run(program: str, jobs: list[list[Path | str]]) -> None:
    """Do jobs in one process; RuntimeError with the end of what it said if it fails."""
    child = start(program, jobs)
    output, _ = child.communicate("\n")
    if child.returncode:
        raise RuntimeError(output[-5000:])
