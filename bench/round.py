"""Run a few rounds of the demo recipe and print where the time of one round (64 prompts) goes."""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from iwopd_megatron.records.runlog import read_metrics

ROUNDS, WARM_UP = 15, 5


def main():
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        command = [sys.executable, "-m", "iwopd_megatron", "train", "recipes/demo_tiny_moe.yaml"]
        settings = [f"out={run}", f"train.rounds={ROUNDS}", "evaluate.every=1000"]
        subprocess.run(command + settings, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
        rounds = [line for line in read_metrics(run) if line["kind"] == "round"][WARM_UP:]
    total = statistics.median(line["seconds"] for line in rounds)
    phases = {
        name: statistics.median(line["time"][name] for line in rounds) for name in rounds[0]["time"]
    }
    print("one round of the demo, 64 prompts, 2 processes of 1 thread (medians)")
    print("| phase | ms | share |")
    print("| --- | --- | --- |")
    for name, value in sorted(phases.items(), key=lambda item: -item[1]):
        print(f"| {name} | {value * 1e3:.0f} | {value / total:.0%} |")
    print(f"| round | {total * 1e3:.0f} | 100% |")
    print(json.dumps({"round_seconds": round(total, 4), "largest": max(phases, key=phases.get)}))


if __name__ == "__main__":
    main()
