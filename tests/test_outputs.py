"""What cannot be written is refused in one sentence before any work, and nothing is left behind."""

import json
from pathlib import Path

import pytest

from iwopd_megatron.cli import main as cli
from iwopd_megatron.errors import RecipeError
from iwopd_megatron.files.outputs import check_file, check_folder

RECIPE = "recipes/demo_tiny_moe.yaml"
LONG = "x" * 300


@pytest.fixture(autouse=True)
def here(in_the_repository):
    """Recipes name their files relative to the repository."""


@pytest.fixture
def places(tmp_path):
    (tmp_path / "file").write_text("kept")
    run = tmp_path / "run"
    run.mkdir()
    (run / "metrics.jsonl").write_text('{"kind": "round", "round": 1}\n')
    return tmp_path


def call(monkeypatch, capsys, *words):
    monkeypatch.setattr("sys.argv", ["iwopd", *map(str, words)])
    with pytest.raises(SystemExit) as left:
        cli.main()
    return left.value.code, capsys.readouterr()


COMMANDS = {
    "train": ["train", RECIPE, "out={}"],
    "sft": ["sft", "recipes/demo_student.yaml", "teacher=null", "student.hf=recipes/demo/student",
            "data.train=recipes/demo/train.jsonl", "data.eval=null", "out={}"],
    "servers": ["train", RECIPE, "out=RUN2", "rollout.sync_folder={}"],
    "compare": ["compare", RECIPE, "--out", "{}"],
    "eval": ["eval", "recipes/demo/student", "--bench", "toy", "--out", "{}"],
    "export": ["export", "recipes/demo/student", "{}/hf", "--hf", "recipes/demo/student"],
    "convert": ["convert", "recipes/demo/student", "{}/checkpoint"],
    "prune": ["prune", "recipes/demo/student", "{}/fewer", "--drop", "1"],
    "toy-task": ["toy-task", "{}"],
    "text-task": ["text-task", "{}"],
    "report": ["report", "RUN", "--out", "{}"],
    "launch": ["launch", RECIPE, "out={}", "--cluster", "local"],
    "plan": ["plan", RECIPE, "--picture", "{}/plan.png"],
}  # fmt: skip


@pytest.mark.parametrize("bad", ["/proc/x", "/dev/null", "FILE", "FILE/below", "/proc/1/x", LONG])
@pytest.mark.parametrize("command", COMMANDS)
def test_an_output_that_cannot_be(command, bad, places, monkeypatch, capsys):
    monkeypatch.setattr(
        "iwopd_megatron.cli.train.load_worker", lambda: pytest.fail("work has begun")
    )
    bad = bad.replace("FILE", str(places / "file"))
    words = [w.replace("{}", bad).replace("RUN", str(places / "run")) for w in COMMANDS[command]]
    before = sorted(places.rglob("*"))
    code, said = call(monkeypatch, capsys, *words)
    (line,) = said.err.splitlines()
    assert code == 2 and line.startswith("error: ") and bad in line
    assert "choose" in line and said.out == ""
    assert sorted(places.rglob("*")) == before and (places / "file").read_text() == "kept"


def test_a_picture_needs_its_folder(tmp_path, monkeypatch, capsys):
    """Found before planning, whose figures would be printed otherwise."""
    code, said = call(monkeypatch, capsys, "plan", RECIPE, "--picture", tmp_path / "no" / "p.png")
    assert code == 2 and said.out == ""
    assert f"there is no folder {tmp_path / 'no'}; make it" in said.err
    assert not (tmp_path / "no").exists()


def test_what_can_be_written_is_left_as_it_was(tmp_path):
    check_folder(tmp_path / "a" / "b" / "c", "out")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "file").write_text("kept")
    check_folder(tmp_path / "there", "out")
    check_file(tmp_path / "there" / "file", "--picture")
    check_file(tmp_path / "there" / "new", "--picture")
    assert [x.name for x in (tmp_path / "there").iterdir()] == ["file"]
    assert (tmp_path / "there" / "file").read_text() == "kept"


@pytest.mark.parametrize("name", ["link", "a\0b"])
def test_names_that_no_folder_can_have(name, tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(RecipeError, match="out="):
        check_folder(tmp_path / name, "out")


def test_a_disk_that_refuses_is_found_before_work(tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tempfile.TemporaryFile", full)
    with pytest.raises(RecipeError, match=r"cannot be written to \(No space left on device\)"):
        check_folder(tmp_path, "out")


def test_a_started_run_is_not_touched_by_the_question(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "metrics.jsonl").write_text(json.dumps({"kind": "round", "round": 1}) + "\n")
    check_folder(run, "out")
    assert [x.name for x in Path(run).iterdir()] == ["metrics.jsonl"]
