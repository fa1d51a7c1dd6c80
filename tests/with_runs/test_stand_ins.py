"""What stands for CUDA's part of Megatron-Core: left out, alone, it is missed.

Of those that are not named here Megatron makes use too (in both versions), but a step of a small
MoE on tp2 etp2 goes on without any one of them.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("without_stand_in.py")
NAMES = [
    "device=",
    "Tensor.type",
    "torch.cuda.current_device",
    "torch.cuda.Stream",
    "torch.cuda.current_stream",
    "torch.cuda.get_rng_state",
    "megatron.core.tensor_parallel.random._get_cuda_rng_state",
    "megatron.core.transformer.moe.token_dispatcher.sort_chunks_by_idxs",
]


def run_without(name, model):
    """Megatron reads some while it is imported: a new interpreter each."""
    return subprocess.run(
        [sys.executable, "-W", "ignore", SCRIPT, name, model],
        env=os.environ | {"PYTHONPATH": str(SCRIPT.parents[2])},
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_with_all_of_them_a_step_is_hugging_faces(moe_folder):
    done = run_without("", moe_folder)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", NAMES)
def test_each_is_missed(name, moe_folder):
    done = run_without(name, moe_folder)
    assert done.returncode != 0, f"{name} is not needed"
