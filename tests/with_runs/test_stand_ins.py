"""What stands for CUDA's part of Megatron-Core: each left out, alone, is missed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from iwopd_megatron.runtime import stand_ins

SCRIPT = Path(__file__).with_name("without_stand_in.py")
NAMES = ["device=", "Tensor.type", *stand_ins.torch_parts(), *stand_ins.megatron_parts()]


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
