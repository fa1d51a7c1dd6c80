"""Checkpoints cross Megatron-Core's versions: what one writes another loads, in another layout.

OTHER_PYTHON is the interpreter of an environment with the other version (`make test-oldest`).
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from with_versions.resave import whole_tensors

HERE, OTHER = sys.executable, os.environ.get("OTHER_PYTHON")
ROOT = Path(__file__).parents[2]
LAYOUTS = {  # of the writer, of the reader
    "moe": ({"ep": 2}, {"tp": 2, "etp": 2}),
    "dense": ({"pp": 2, "vpp": 2}, {"tp": 2}),
    "uneven": (
        {"pp": 2, "vpp": 2, "pipeline_model_parallel_layout": "E|t*3|t|L"},
        {"pp": 2, "num_layers_in_first_pipeline_stage": 1},
    ),
}


def python(interpreter, *args):
    settings = {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [interpreter, "-W", "ignore", *map(str, args)],
        env=os.environ | settings,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def resave(interpreter, model, saved, out, layout):
    script = Path(__file__).with_name("resave.py")
    python(interpreter, script, model, saved, out, json.dumps(layout))
    return out / "checkpoints" / "round_000001"


def test_the_two_are_different_versions():
    ask = "from importlib.metadata import version; print(version('megatron-core'))"
    assert python(HERE, "-c", ask) != python(OTHER, "-c", ask)


@pytest.mark.parametrize("kind", LAYOUTS)
@pytest.mark.parametrize(("writer", "reader"), [(HERE, OTHER), (OTHER, HERE)], ids=["to", "from"])
def test_weights_and_optimiser_come_back_from_the_other(
    writer, reader, kind, moe_folder, dense_folder, tmp_path
):
    model = dense_folder if kind == "dense" else moe_folder
    first, second = LAYOUTS[kind]
    written = resave(writer, model, "-", tmp_path / "written", first)
    loaded = resave(reader, model, written, tmp_path / "loaded", second)
    before, after = whole_tensors(written), whole_tensors(loaded)
    assert before.keys() == after.keys()
    moments = [key for key in before if "exp_avg" in key]
    assert len(moments) > 10 and all(before[key].any() for key in moments)
    for key, tensor in before.items():
        assert torch.equal(tensor, after[key]), key
    written, loaded = (torch.load(x / "common.pt", weights_only=False) for x in (written, loaded))
    assert written == loaded  # step counts, schedule, what the run keeps
