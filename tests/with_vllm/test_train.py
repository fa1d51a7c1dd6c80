"""A whole run with a vLLM server that it starts itself."""

import json
import subprocess
import sys

import pytest
from rig import RECIPE, ROOT


@pytest.mark.parametrize("sync", ["distributed"])
def test_a_run_with_vllm(tmp_path, sync):
    command = [sys.executable, "-m", "iwopd_megatron", "train", str(RECIPE), f"out={tmp_path}/run"]
    overrides = [
        f"rollout.sync={sync}", "rollout.verify_every=1", "train.rounds=3", "train.warmup_rounds=1",
        "train.prompts_per_round=16", "evaluate.every=3", "evaluate.problems=32",
    ]  # fmt: skip
    done = subprocess.run([*command, *overrides], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    lines = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    rounds = [json.loads(line) for line in lines]
    print(rounds)
