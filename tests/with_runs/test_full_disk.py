"""A disk that becomes full: one sentence, exit code 75, and the run goes on when there is room."""

import subprocess

import pytest
from forked import iwopd

RECIPE = "recipes/demo_tiny_moe.yaml"
SETTINGS = [
    "train.rounds=4",
    "train.warmup_rounds=1",
    "train.prompts_per_round=16",
    "checkpoint.every=1",
    "evaluate.every=2",
    "evaluate.problems=16",
    "checkpoint.keep=3",
]
ONE = ["student.parallel={}"]


def mount(*words):
    return subprocess.run(["mount", *map(str, words)], capture_output=True, text=True)


@pytest.fixture
def disk(tmp_path):
    """A file system of its own: (folder, resize)."""
    folder = tmp_path / "disk"
    folder.mkdir()
    made = mount("-t", "tmpfs", "-o", "size=16k", "tmpfs", folder)
    if made.returncode:
        pytest.skip(f"no file system can be mounted here: {made.stderr.strip()}")
    yield folder, lambda size: mount("-o", f"remount,size={size}", folder)
    subprocess.run(["umount", folder], check=True)


def train(out, *more):
    return iwopd("train", RECIPE, *SETTINGS, f"out={out}", *more)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Results of the run that has room, by layout."""
    found = {}

    def results_of(layout):
        key = tuple(layout)
        if key not in found:
            out = tmp_path_factory.mktemp("whole") / "run"
            ended = train(out, *layout)
            assert ended.returncode == 0, ended.stderr
            found[key] = results(out)
        return found[key]

    return results_of


def results(out):
    return {name: (out / name).read_bytes() for name in ("hf/model.safetensors", "metrics.jsonl")}


@pytest.mark.parametrize(
    ("size", "layout", "mode", "last"),
    [
        ("16k", ONE, "checkpoint.async_save=true", None),  # metrics
        ("1500k", ONE, "checkpoint.async_save=true", None),  # the first checkpoint
        ("5500k", [], "checkpoint.async_save=true", 2),  # two ranks, before the third begins
        ("6900k", [], "checkpoint.async_save=false", 2),  # in the middle of it
        ("7450k", [], "checkpoint.async_save=false", 3),  # the fourth
        ("400k", ONE, "checkpoint.every=null", None),  # the final weights
    ],
)
def test_a_full_disk(size, layout, mode, last, disk, whole):
    folder, resize = disk
    resize(size)
    out = folder / "run"
    failed = train(out, *layout, mode)
    assert failed.returncode == 75, failed.stderr
    (line,) = failed.stderr.splitlines()
    assert line.startswith(f"error: {out}") or line.startswith(f"error: a file of {out}")
    assert "(No space left on device)" in line
    assert line.endswith("make room and go on with --resume.")
    good = out / f"checkpoints/round_{last:06d}" if last else "there is no checkpoint yet"
    assert str(good) in line
    resize("50m")
    again = train(out, *layout, mode, "--resume")
    assert again.returncode == 0, again.stderr
    assert ("resumed after round" in again.stdout) == (last is not None)
    assert not list(out.glob("**/*.partial"))
    assert results(out) == whole(layout)


def test_no_room_at_all_is_found_before_the_run_begins(disk):
    folder, _ = disk
    (folder / "other").write_bytes(bytes(16384))
    failed = train(folder / "run")
    assert failed.returncode == 2 and failed.stdout == ""
    assert "cannot be written to (No space left on device)" in failed.stderr
    assert not (folder / "run").exists()
