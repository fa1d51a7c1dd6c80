"""What `iwopd status` says, from the files of a launch and a run."""

import json
import time

import pytest

from iwopd_megatron.errors import RecipeError
from iwopd_megatron.launch.rendezvous import Rendezvous
from iwopd_megatron.launch.roles import Job, Role
from iwopd_megatron.launch.status import run_status


def test_status_of_a_launch(tmp_path):
    run, launch = tmp_path / "run", tmp_path / "run" / "launch" / "x_1"
    roles = [
        Role("trainer", 2, 1, 1, []),
        Role("teacher", 1, 1, 1, [], urls_key="teacher.urls"),
    ]
    Job("/", roles, 8).write(launch)
    assert [r["state"] for r in run_status(run, launch)["roles"]] == ["not started"] * 3
    Rendezvous(launch, 0).status("trainer", 0, "failed")
    rendezvous = Rendezvous(launch, 1)
    rendezvous.status("trainer", 0, "waiting", detail="for teacher 0")
    rendezvous.status("teacher", 0, "ready", restarts=2)
    lines = [
        {"kind": "eval", "round": 0, "accuracy": 0.25},
        {"kind": "round", "round": 1, "loss": 0.5, "tokens_per_second": 100.0},
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (run / "recipe.yaml").write_text("train:\n  rounds: 7\n")
    for name in ("round_000001", "round_000010", "round_000011.partial"):
        (run / "checkpoints" / name).mkdir(parents=True)
    found = run_status(run, launch, now=time.time() + 60)
    assert found["attempt"] == 1
    assert [(r["role"], r["state"]) for r in found["roles"]] == [
        ("trainer", "waiting"),
        ("trainer", "not started"),
        ("teacher", "ready"),
    ]
    assert found["roles"][2]["restarts"] == 2
    assert (found["round"], found["rounds"], found["tokens_per_second"]) == (1, 7, 100.0)
    assert found["checkpoint"].endswith("round_000010")
    assert 55 < found["silent_seconds"] < 120
    assert 55 < found["roles"][0]["seconds"] < 120
    assert rendezvous.finish(75) == 75 and rendezvous.finish(0) == 75
    assert run_status(run, launch)["exit_code"] == 75


def test_status_of_no_run(tmp_path):
    with pytest.raises(RecipeError, match="is not a run folder"):
        run_status(tmp_path, None)
