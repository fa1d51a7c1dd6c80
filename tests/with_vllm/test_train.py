"""A whole run of `recipes/demo_vllm.yaml`: the trainer's processes and a vLLM server it starts."""

import subprocess
import sys

from rig import RECIPE
from served_models import ROOT

from iwopd_megatron.records.runlog import read_metrics
from iwopd_megatron.runtime.services import outer_environment


def test_a_run_trains_on_what_vllm_writes(tmp_path):
    """Every update is proven, and the engine's log-probs are the trainer's."""
    out, log = tmp_path / "run", tmp_path / "log"
    command = [
        sys.executable,
        "-W",
        "ignore",
        "-m",
        "iwopd_megatron",
        "train",
        str(RECIPE),
        f"out={out}",
        "train.rounds=3",
        "train.warmup_rounds=1",
        "data.eval=null",
    ]
    with log.open("w") as file:
        done = subprocess.run(
            command, cwd=ROOT, env=outer_environment(), stdout=file, stderr=file, timeout=900
        )
    assert done.returncode == 0, log.read_text()[-3000:]
    rounds = [line for line in read_metrics(out) if line["kind"] == "round"]
    assert [line["round"] for line in rounds] == [1, 2, 3]
    assert max(line["drift"] for line in rounds) < 1e-5
