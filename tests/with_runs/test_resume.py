"""Resuming: after SIGKILL at a chosen point to the bit, and past a damaged checkpoint."""

import os
import shutil
import signal
import time

import pytest
from forked import iwopd, python, started

RECIPE = "recipes/demo_tiny_moe.yaml"
SETTINGS = [
    "train.rounds=5",
    "train.warmup_rounds=2",
    "train.prompts_per_round=16",
    "checkpoint.every=2",
    "evaluate.every=10",
    "evaluate.problems=16",
    "checkpoint.keep=3",
]


def train(out, *more):
    result = iwopd("train", RECIPE, *SETTINGS, f"out={out}", *more)
    assert result.returncode == 0, result.stderr
    return result.stdout


def results(out):
    return {name: (out / name).read_bytes() for name in ("hf/model.safetensors", "metrics.jsonl")}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The run that nothing disturbs."""
    out = tmp_path_factory.mktemp("whole") / "run"
    train(out)
    return out


@pytest.mark.parametrize(
    ("at_round", "point", "seconds", "in_background", "resumed"),
    [
        (3, "train", 0.02, False, {2}),
        (3, "train", 0.02, True, {0, 2}),  # round 2's may still be being written
        (4, "save", 0.0, True, {2}),
        (4, "save", 0.3, False, {2, 4}),
        (5, "generate", 0.0, True, {2, 4}),
        (1, "sync", 0.0, True, {0}),
    ],
)
def test_killed_and_resumed_is_identical(
    at_round, point, seconds, in_background, resumed, whole, tmp_path
):
    out, mode = tmp_path / "run", f"checkpoint.async_save={str(in_background).lower()}"
    killed = python(
        "bench/killed_run.py", at_round, point, seconds, RECIPE, *SETTINGS, f"out={out}", mode
    )
    assert killed.returncode == -9, killed.stderr
    assert not (out / "hf").exists()
    said = train(out, "--resume", mode)
    found = [line.split()[3] for line in said.splitlines() if line.startswith("resumed after")]
    assert int((found or [0])[0]) in resumed, said
    assert results(out) == results(whole)


def test_a_writer_that_dies_ends_the_run_with_a_sentence(whole, tmp_path):
    """Ranks that waited for it would wait for ever."""
    out = tmp_path / "run"
    script = (
        "import os, signal, sys\n"
        "from iwopd_megatron.cli import main as cli\n"
        "from iwopd_megatron.train import sharded_save\n"
        "def dies(*args, **kwargs): os.kill(os.getpid(), signal.SIGKILL)\n"
        "sharded_save.CheckpointWriter.write = dies\n"
        "cli.main()"
    )
    failed = python("-c", script, "train", RECIPE, *SETTINGS, f"out={out}")
    assert failed.returncode == 5, failed.stderr
    assert "round_000002 was not written, for the writer of rank 0 died (SIGKILL)" in failed.stderr
    assert failed.stderr.count("\n") == 1
    assert train(out, "--resume").count("resumed") == 0
    assert results(out) == results(whole)


def test_sigterm_waits_for_the_pending_checkpoint(whole, tmp_path):
    out = tmp_path / "run"
    process = started("train", RECIPE, *SETTINGS, f"out={out}")
    metrics = out / "metrics.jsonl"
    while process.poll() is None and not (
        metrics.is_file() and '"round", "round": 2' in metrics.read_text()
    ):
        time.sleep(0.002)
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=400)
    assert process.returncode == 75 and "go on with --resume" in said
    folders = sorted(x.name for x in (out / "checkpoints").iterdir())
    assert folders and not any(name.endswith("partial") for name in folders)
    assert "resumed after round" in train(out, "--resume")
    assert results(out) == results(whole)


def largest(folder):
    return max(folder.glob("*.distcp"), key=lambda file: file.stat().st_size)


def truncate(folder):
    file = largest(folder)
    os.truncate(file, file.stat().st_size - 100)
    return f"{file.name} has"


def flip_a_bit(folder):
    file = largest(folder)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    return f"the content of {file.name} has changed"


def remove_listing(folder):
    (folder / "files.json").unlink()
    return "files.json is missing"


@pytest.mark.parametrize("damage", [truncate, flip_a_bit, remove_listing])
def test_a_damaged_checkpoint_is_skipped(damage, whole, tmp_path):
    """Named in a sentence; the one before it is used, and the run ends the same."""
    out = tmp_path / "run"
    shutil.copytree(whole, out, ignore=shutil.ignore_patterns("round_000005"))
    shutil.rmtree(out / "hf")
    newest = out / "checkpoints/round_000004"
    words = damage(newest)
    said = train(out, "--resume")
    assert f"{newest} is damaged and skipped: " in said and words in said
    assert "resumed after round 2 from" in said
    assert results(out) == results(whole)


def test_no_sound_checkpoint_starts_over(whole, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    shutil.rmtree(out / "hf")
    for folder in (out / "checkpoints").iterdir():
        remove_listing(folder)
    said = train(out, "--resume")
    assert said.count("is damaged and skipped") == 3 and "resumed after" not in said
    assert results(out) == results(whole)
