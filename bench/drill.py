"""Kill a run with SIGKILL at random points, resume it, and compare with the run never killed.

python bench/drill.py [KILLS]

The demo recipe, eight rounds on two processes with a checkpoint every two. Each kill hits launcher
and ranks at a random moment of a random phase of a random round; identical means the final weights
and metrics.jsonl are the same byte for byte.
"""

import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
from killed_run import POINTS

ROUNDS, EVERY = 8, 2
# Longest delay after a point is reached: about what the phase takes.
SECONDS = {"generate": 0.1, "score": 0.05, "train": 0.1, "step": 0.01, "sync": 0.01, "save": 0.6}
SETTINGS = [
    f"train.rounds={ROUNDS}",
    "train.warmup_rounds=2",
    f"checkpoint.every={EVERY}",
    "evaluate.every=4",
    "evaluate.problems=64",
    "train.minibatches=2",
]
PYTHON = [sys.executable, "-W", "ignore"]
RECIPE = "recipes/demo_tiny_moe.yaml"


def train(out, *more):
    command = [*PYTHON, "-m", "iwopd_megatron", "train", RECIPE, *SETTINGS, f"out={out}", *more]
    return subprocess.run(command, capture_output=True, text=True)


def killed(out, at_round, point, seconds):
    arguments = [str(at_round), point, f"{seconds:.4f}", RECIPE, *SETTINGS, f"out={out}"]
    return subprocess.run([*PYTHON, "bench/killed_run.py", *arguments], capture_output=True)


def results(out):
    return {name: (out / name).read_bytes() for name in ("hf/model.safetensors", "metrics.jsonl")}


def main():
    kills, rng = int(sys.argv[1]) if len(sys.argv) > 1 else 20, random.Random(0)
    identical = 0
    with tempfile.TemporaryDirectory() as folder:
        whole = Path(folder) / "whole"
        done = train(whole)
        assert done.returncode == 0, done.stderr
        expected = results(whole)
        print("| kill | round | point | s after it | exit | resumed after round | identical |")
        print("| --- | --- | --- | --- | --- | --- | --- |")
        for i in range(kills):
            point = POINTS[i % len(POINTS)] if i < len(POINTS) else rng.choice(POINTS)
            at_round = EVERY * rng.randint(1, ROUNDS // EVERY - 1) if point == "save" else None
            at_round = at_round or rng.randint(1, ROUNDS)
            seconds = rng.uniform(0, SECONDS[point])
            out = Path(folder) / f"kill-{i}"
            code = killed(out, at_round, point, seconds).returncode
            time.sleep(0.2)
            again = train(out, "--resume")
            said = [line for line in again.stdout.splitlines() if "resumed after round" in line]
            start = said[0].split()[3] if said else "0"
            same = again.returncode == 0 and results(out) == expected
            identical += same
            print(
                f"| {i + 1} | {at_round} | {point} | {seconds:.3f} | {code} | {start} | "
                f"{'yes' if same else 'NO ' + again.stderr[-200:]} |",
                flush=True,
            )
    print(json.dumps({"kills": kills, "identical": identical}))


if __name__ == "__main__":
    main()
