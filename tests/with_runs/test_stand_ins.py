"""What stands for CUDA's part of Megatron-Core: left out, alone, each is missed in a step.

`torch.cuda.synchronize` is asked for by Megatron's own save only: test_torch_dist and test_traps.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("without_stand_in.py")
RANDOM = "megatron.core.tensor_parallel.random"
DISPATCHER = "megatron.core.transformer.moe.token_dispatcher"
EXPERTS, UNEVEN, TIED = {"ep": 2}, {"tp": 2, "ep": 2, "etp": 2}, {"pp": 2}
LAYOUTS = {
    "device=": EXPERTS,
    "Tensor.type": EXPERTS,
    "torch.cuda.current_device": EXPERTS,
    "torch.cuda.Stream": EXPERTS,
    "torch.cuda.current_stream": EXPERTS,
    "torch.cuda.get_rng_state": EXPERTS,
    "torch.Tensor.cuda": TIED,
    f"{RANDOM}._get_cuda_rng_state": EXPERTS,
    f"{RANDOM}._set_cuda_rng_state": EXPERTS,
    f"{DISPATCHER}.maybe_move_tensor_to_cpu": EXPERTS,
    f"{DISPATCHER}.sort_chunks_by_idxs": EXPERTS,
    "megatron.core.tensor_parallel.mappings._gather_along_first_dim": UNEVEN,
}
ELSEWHERE = {"torch.cuda.synchronize"}


def run_without(name, axes, moe_folder, tied_folder):
    """Megatron reads some while it is imported: a new interpreter each."""
    model = tied_folder if axes is TIED else moe_folder
    return subprocess.run(
        [sys.executable, "-W", "ignore", SCRIPT, name, model, json.dumps(axes)],
        env=os.environ | {"PYTHONPATH": str(SCRIPT.parents[2])},
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.parametrize("axes", [EXPERTS, UNEVEN, TIED], ids=str)
def test_with_all_of_them_a_step_is_hugging_faces(axes, moe_folder, tied_folder):
    done = run_without("", axes, moe_folder, tied_folder)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", LAYOUTS)
def test_each_is_missed(name, moe_folder, tied_folder):
    done = run_without(name, LAYOUTS[name], moe_folder, tied_folder)
    assert done.returncode != 0, f"{name} is not needed"


def test_all_are_tried():
    from iwopd_megatron.runtime import stand_ins

    parts = stand_ins.torch_parts() | stand_ins.megatron_parts()
    assert {*parts, "device=", "Tensor.type"} == {*LAYOUTS, *ELSEWHERE}
