"""Whole runs of `recipes/demo_sglang.yaml`: trainer, SGLang server and teacher as processes."""

import os
import signal
import time
from pathlib import Path

import psutil
import pytest
from forked import Command, iwopd, started

from iwopd_megatron.files.run_files import read_records
from iwopd_megatron.records.runlog import read_metrics
from iwopd_megatron.train.journal import Journal

PROMPTS = 64


def start(out: Path, *overrides: str) -> Command:
    return started(
        "train",
        "recipes/demo_sglang.yaml",
        f"out={out}",
        "train.rounds=6",
        "train.warmup_rounds=2",
        "data.eval=null",
        "checkpoint.every=1",
        *overrides,
        output=out.with_suffix(".log"),
    )


def finish(process: Command, out: Path) -> list[dict]:
    code = process.wait(500)
    assert code == 0, out.with_suffix(".log").read_text()[-3000:]
    rounds = [line for line in read_metrics(out) if line["kind"] == "round"]
    assert [line["round"] for line in rounds] == list(range(1, 7)), "each round exactly once"
    assert not list((out / "collected").glob("*")), "answers that were trained on are kept"
    return rounds


def wait_for(condition, process: Command, limit=300):
    end = time.monotonic() + limit
    while not condition():
        assert process.poll() is None, "the run has ended"
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.02)


def rounds_done(out: Path) -> int:
    file = out / "metrics.jsonl"
    return len(read_records(file)) if file.is_file() else 0


def servers_of(process: Command, words: str) -> list[psutil.Process]:
    """Processes below the run whose command line has these words."""
    children = psutil.Process(process.pid).children(recursive=True)
    return [child for child in children if words in " ".join(_command(child))]


def test_roles_apart_on_policy(tmp_path):
    """The engine's log-probs are the trainer's; scores are there early; every update is proven."""
    out = tmp_path / "run"
    rounds = finish(start(out), out)
    assert max(line["drift"] for line in rounds) < 1e-5
    assert max(line["scored_early"] for line in rounds) > 0
    assert (out / "logs/rollout-0.log").is_file() and (out / "logs/teacher.log").is_file()
    assert not [p for p in psutil.process_iter() if str(out) in " ".join(_command(p))]
    assert iwopd("report", out).returncode == 0
    names = {path.stem for path in (out / "figures").glob("*.png")}
    assert {"weight_update", "scored_early", "drift", "phase_times"} <= names


def _command(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except (psutil.NoSuchProcess, psutil.ZombieProcess):
        return []


@pytest.mark.parametrize("sync", ["tensor", "distributed"])
def test_next_round_generated_while_this_one_trains(tmp_path, sync):
    """Answers are of this version or the one before; their drift is a step's, and is corrected."""
    out = tmp_path / "run"
    rounds = finish(start(out, "rollout.max_staleness=1", f"rollout.sync={sync}"), out)
    drifts = [line["drift"] for line in rounds]
    assert drifts[0] < 1e-5 and 1e-5 < max(drifts) < 0.3


def test_trainer_killed_halfway_through_a_round_keeps_its_answers(tmp_path):
    """Resumed, the round trains on the answers that were finished, and asks for the others."""
    out, journal = tmp_path / "run", Journal(tmp_path / "run")
    slow = "rollout.servers.max_running=2"
    process = start(out, slow)
    file = journal.folder / "round-000003.jsonl"
    wait_for(lambda: file.is_file() and len(file.read_text().split("\n")) > 8, process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = {line["index"]: line["response_ids"] for line in read_records(file)}
    assert 7 <= len(kept) < PROMPTS
    process = start(out, slow, "--resume")
    wait_for(lambda: len(read_records(file)) > len(kept) or rounds_done(out) > 2, process)
    rounds = finish(process, out)
    assert rounds[2]["response_tokens"] >= sum(map(len, kept.values()))


def test_a_killed_rollout_server_costs_no_round_and_no_answer(tmp_path):
    out = tmp_path / "run"
    process = start(out)
    wait_for(lambda: rounds_done(out) >= 2, process)
    (server, *_) = servers_of(process, "sglang.launch_server")
    os.killpg(os.getpgid(server.pid), signal.SIGKILL)
    rounds = finish(process, out)
    assert "rollout server lost" in out.with_suffix(".log").read_text()
    assert max(line["drift"] for line in rounds) < 1e-5
