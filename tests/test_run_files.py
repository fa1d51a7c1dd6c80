"""What runs write a line at a time: read past a crash, never made worse by one, damage named."""

import errno
import json
import os

import pytest

from iwopd_megatron.cli import main as cli
from iwopd_megatron.errors import RecipeError
from iwopd_megatron.files import run_files
from iwopd_megatron.files.run_files import append_record, read_records
from iwopd_megatron.records.runlog import append_event, read_events

LINES = [{"kind": "round", "round": n, "loss": 0.5, "lr": 1e-5} for n in (1, 2, 3)]
DAMAGES = {
    "cut": '{"kind": "rou',
    "nothing of it": "\x00\x00\x00",
    "a list": "[1, 2]",
    "a number": "7",
    "no round": '{"kind": "round"}',
    "a round of another type": '{"kind": "round", "round": "2"}',
    "two in one": '{"kind": "round", "round": 2}{"kind": "round", "round": 3}',
}


def write_run(folder, lines, name="metrics.jsonl"):
    folder.mkdir(exist_ok=True)
    if name != "metrics.jsonl":
        write_run(folder, [json.dumps(line) for line in LINES])
    (folder / name).write_text("\n".join(lines) + "\n")
    return folder


def call(monkeypatch, capsys, *words):
    """Exit code and standard error of a command of this process."""
    monkeypatch.setattr("sys.argv", ["iwopd", *map(str, words)])
    run_files._note.cache_clear()
    with pytest.raises(SystemExit) as left:
        cli.main()
    return left.value.code, capsys.readouterr().err


@pytest.mark.parametrize("name", ["metrics.jsonl", "timing.jsonl"])
@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
@pytest.mark.parametrize("command", ["status", "report"])
def test_a_damaged_line(name, damage, command, tmp_path, monkeypatch, capsys):
    """The last one is left out with a note, another one is a sentence that names it."""
    whole = [json.dumps(line) for line in LINES]
    run = write_run(tmp_path / "last", [*whole[:2], damage], name)
    code, said = call(monkeypatch, capsys, command, run)
    assert code == 0
    (line,) = [line for line in said.splitlines() if line.startswith("note: ")]
    assert line.startswith(f"note: {run / name}: its last line is damaged (")
    run = write_run(tmp_path / "middle", [whole[0], damage, whole[2]], name)
    code, said = call(monkeypatch, capsys, command, run)
    assert code == 2
    (line,) = said.splitlines()
    assert line.startswith(f"error: {run / name}: line 2 is damaged: ")


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("events.jsonl", '{"ev\n{"round": 1, "event": "x", "text": "y"}\n', "line 1 is damaged"),
        ("events.jsonl", '{"round": 1}\n{"round": 1, "event": "x", "text": "y"}\n', "no 'event'"),
        ("samples/round_000001.jsonl", '{"prompt": "a"}\n[]\n[]\n', "line 1 is damaged"),
        ("prefixes.json", "{", "prefixes.json is damaged"),
        ("eval/trained/results.json", "[]", "results.json is damaged"),
        ("eval/trained/results.json", "{}", "no 'benchmarks'"),
        ("recipe.yaml", "a: [", "is not valid YAML"),
    ],
)
def test_other_damaged_files_of_a_run(name, content, words, tmp_path, monkeypatch, capsys):
    run = write_run(tmp_path / "run", [json.dumps(line) for line in LINES])
    (run / name).parent.mkdir(parents=True, exist_ok=True)
    (run / name).write_text(content)
    code, said = call(monkeypatch, capsys, "report", run)
    assert code == 2
    (line,) = said.splitlines()
    assert line.startswith("error: ") and words in line and str(run / name) in line


def test_what_a_crash_left_is_gone_before_the_next_line(tmp_path):
    """Glued to the next line it would damage that one too."""
    append_event(tmp_path, 1, "resumed", "first")
    with (tmp_path / "events.jsonl").open("a") as file:
        file.write('{"round": 2, "ev')
    append_event(tmp_path, 3, "resumed", "second")
    assert [event["round"] for event in read_events(tmp_path)] == [1, 3]


def test_a_last_line_that_only_lacks_its_end_is_kept(tmp_path):
    file = tmp_path / "x.jsonl"
    file.write_text('{"a": 1}')
    append_record(file, {"a": 2})
    assert read_records(file) == [{"a": 1}, {"a": 2}]


def test_a_line_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    file, write = tmp_path / "x.jsonl", os.write
    append_record(file, {"a": 1})
    before = file.read_bytes()

    def full(descriptor, data):
        if len(data) > 5:
            return write(descriptor, data[:5])  # the disk has room for so much
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        with pytest.raises(OSError, match="No space"):
            append_record(file, {"b": 2})
    assert file.read_bytes() == before
    append_record(file, {"b": 3})
    assert read_records(file) == [{"a": 1}, {"b": 3}]


def test_an_object_that_is_no_json_is_named(tmp_path):
    (tmp_path / "x.json").write_text("{")
    with pytest.raises(RecipeError, match="x.json is damaged: it is not JSON"):
        run_files.read_object(tmp_path / "x.json")
