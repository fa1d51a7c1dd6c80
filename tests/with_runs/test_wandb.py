"""W&B, offline, with the real client; refused where there is none."""

import json
import os
import struct
import subprocess
import sys

import pytest
from forked import ROOT, iwopd
from wandb.proto import wandb_internal_pb2

SMALL = [
    "student.parallel={}",
    "train.rounds=2",
    "train.warmup_rounds=1",
    "evaluate.problems=8",
    "train.prompts_per_round=8",
    "train.microbatch_tokens=300",
    "evaluate.every=1",
    "checkpoint.every=1",
    "wandb.project=tests",
    "wandb.mode=offline",
]


def words(out, *more):
    return ["train", "recipes/demo_tiny_moe.yaml", f"out={out}", *SMALL, *more]


def test_without_wandb_a_recipe_that_wants_it_is_refused(tmp_path):
    """As where it is not installed: Python runs sitecustomize.py first."""
    (tmp_path / "sitecustomize.py").write_text('import sys; sys.modules["wandb"] = None')
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}:{ROOT}"}
    command = [sys.executable, "-m", "iwopd_megatron", *words(tmp_path / "run")]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and "iwopd-megatron[wandb]" in done.stderr
    assert "Traceback" not in done.stderr and not (tmp_path / "run/metrics.jsonl").exists()


def stored(content, block=32768):
    """The records of a .wandb file: LevelDB's log format after seven bytes of header."""
    place, parts = 7, []
    while place + 7 <= len(content):
        left = block - place % block
        if left < 7:
            place += left
            continue
        length, kind = struct.unpack_from("<HB", content, place + 4)
        parts.append(content[place + 7 : place + 7 + length])
        place += 7 + length
        if kind in (1, 4):  # full, last
            yield b"".join(parts)
            parts = []


def test_every_number_is_there_and_a_resumed_run_stays_one(tmp_path):
    run = tmp_path / "run"
    done = iwopd(*words(run))
    assert done.returncode == 0, done.stderr
    again = iwopd(*words(run, "train.rounds=3", "--resume"))
    assert again.returncode == 0, again.stderr
    ids, history = set(), []
    for file in sorted(run.glob("wandb/offline-run-*/*.wandb")):
        for data in stored(file.read_bytes()):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            if record.HasField("run"):
                ids.add(record.run.run_id)
            if record.HasField("history"):
                items = record.history.item
                history.append({i.key or i.nested_key[0]: json.loads(i.value_json) for i in items})
    assert ids == {(run / "wandb_id").read_text()}
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert len(history) == len(lines) == 7  # four evaluations, three rounds
    for line, sent in zip(lines, history, strict=True):
        key = "loss" if line["kind"] == "round" else "accuracy"
        assert sent[f"{line['kind']}/{key}"] == pytest.approx(line[key])
        assert sent["round_number"] == line["round"]
