"""Every mistake on a command line or in a recipe is one sentence: `error: ...`, exit code 2."""

import os
import subprocess
import sys

import pytest

from iwopd_megatron.cli import main as cli
from iwopd_megatron.cli.main import COMMANDS

RECIPE = "recipes/demo_tiny_moe.yaml"


@pytest.fixture(autouse=True)
def here(in_the_repository):
    """Recipes name their files relative to the repository."""


@pytest.fixture
def say(monkeypatch, capsys):
    """The sentence of a command of this process, which must say just that."""

    def run(*words):
        monkeypatch.setattr("sys.argv", ["iwopd", *map(str, words)])
        with pytest.raises(SystemExit) as left:
            cli.main()
        said = capsys.readouterr()
        (line,) = said.err.splitlines()
        assert left.value.code == 2 and said.out == ""
        assert line.startswith("error: ") and line[7] not in "'[" + "\n" and line[-1] in ".?"
        for foreign in ("nput should", "pydantic", "Traceback", "unable to parse", "dictionary"):
            assert foreign not in line
        return line

    return run


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("student=3", "'student' is 3; write a section"),
        ("student.hf=", "'student.hf' is empty; write a path"),
        ("student.hf=3", "'student.hf' is 3; write a path"),
        ("student=[1]", "'student' is a list; write a section"),
        ("out=", "'out' is empty; write a path"),
        ("out=true", "'out' is true; write a path"),
        ("loss=", "'loss' is empty; write a section"),
        ("train.rounds=1.5", "'train.rounds' is 1.5; write an integer"),
        ("train.rounds=true", "'train.rounds' is true: write a number"),
        ("train.rounds=many", "'train.rounds' is 'many'; write an integer"),
        ("train.rounds=9999999999999999999999", "write a number less than 2147483648"),
        ("train.lr=yes", "'train.lr' is true: write a number; YAML reads yes"),
        ("train.lr=1e400", "'train.lr' is '1e400'; write a finite number"),
        ("train.lr=.nan", "'train.lr' is nan; write a finite number"),
        ("train.lr=-1", "'train.lr' is -1; write a number greater than 0"),
        ("train.betas=[0.9]", "'train.betas' is too short"),
        ("train.betas=[0.9, 0.9, 0.9]", "'train.betas' is a list; write a list of 2 or fewer"),
        ("train.betas=3", "'train.betas' is 3; write a list"),
        ("train.seed=-1", "'train.seed' is -1; write a number greater than or equal to 0"),
        ("data.train=", "'data.train' is empty; write a list"),
        ("data.train=[]", "'data.train' is an empty list; write a list of 1 or more"),
        ("data.train=[3]", "'data.train.0' is 3; write a section"),
        ("data.train=[{share: 1}]", "a source needs a path"),
        ("data.shuffle=maybe", "'data.shuffle' is 'maybe'; write true or false"),
        ("data.where=1", "unknown key 'data.where'"),
        ("data.train=[{path: x, pth: y}]", "unknown key 'data.train.0.pth'; did you mean 'path'?"),
        ("rollout.servers.args={a: [1]}", "'rollout.servers.args.a' is a list"),
        ("rollout.servers.env={a: 1}", "'rollout.servers.env.a' is 1; write text"),
        ("rollout.max_staleness=2", "write one of 0 or 1"),
        ("rollout.engine=HF", "write one of 'hf', 'sglang' or 'vllm'"),
        ("teachers=[a]", "'teachers' is a list; write a section"),
        ("teachers={a: 3}", "'teachers.a' is 3; write a section"),
        ("teachers={1: {hf: x}}", "the key '1' is no word; quote it"),
        ("cluster={}", "'cluster.trainer' is missing"),
        ("train..lr=1", "is not key=value"),
        (".=1", "is not key=value"),
        ("train", "is not key=value"),
        ("train.lr={a: 1, a: 2}", "'a' is there twice"),
        ("train.lr=2020-13-45", "month must be in 1..12"),
        ("train.lr=\t1", "there is a tab"),
        ("train.lr=!!python/object:os.system x", "could not determine a constructor"),
        ("train.lr=*a", "undefined alias"),
        ("train.lr=" + 2000 * "[", "as a YAML value"),
        ("out=a\x01b", "which no text has"),
    ],
)
def test_overrides(words, sentence, say):
    assert sentence in say("plan", RECIPE, words)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "'out' is missing"),
        (b"- a\n- b\n", "must hold 'key: value' lines, not a list"),
        (b"word\n", "must hold 'key: value' lines, not a single value"),
        (b"out: \xff\xfe", "is no UTF-8 text"),
        (b"out: a\x00b", "which no text has"),
        (b"out: x\nstudent:\n\thf: y\n", "line 3: there is a tab; write spaces"),
        (b"out: x\nout: y\n", "line 2: 'out' is there twice; keep one"),
        (b"student:\n  hf: x\n  hf: y\n", "line 3: 'hf' is there twice"),
        (b"on: x\n", "the key 'on' is no word; quote it"),
        (b"? [a]\n: b\n", "line 1"),
        (b"a: [1\nb: }", "line 2"),
        (b"a: 1\n---\nb: 2\n", "line 2"),
        (b"extends: [a]\n", "'extends' is ['a']"),
        (b"extends: nowhere.yaml\n", "nowhere.yaml does not exist"),
    ],
)
def test_recipe_files(content, sentence, tmp_path, say):
    (tmp_path / "recipe.yaml").write_bytes(content)
    line = say("plan", tmp_path / "recipe.yaml")
    assert sentence in line and str(tmp_path) in line


def test_recipes_that_are_no_files(tmp_path, say):
    assert "is a folder; name a YAML file" in say("plan", tmp_path)
    assert "does not exist; recipes ship in" in say("plan", tmp_path / "no.yaml")
    assert "is no file" in say("plan", "/dev/null")
    assert "File name too long" in say("plan", 300 * "x")
    assert "File name too long" in say("report", 300 * "x")
    assert "File name too long" in say("train", RECIPE, "student.hf=" + 300 * "x")
    assert "is not valid YAML" in say("launch", RECIPE, "--cluster", _profile(tmp_path, "a: ["))
    assert "'executor' is missing; add it." in say(
        "launch", RECIPE, "--cluster", _profile(tmp_path, "zzz: 1")
    )


def _profile(folder, text):
    (folder / "profile.yaml").write_text(text)
    return folder / "profile.yaml"


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["train"], "missing argument 'recipe'; see 'iwopd train --help'."),
        (["trian"], "no such command 'trian'; did you mean 'train'? see 'iwopd --help'."),
        (["zzz"], "no such command 'zzz'; see 'iwopd --help'."),
        (["--zzz"], "no such option: --zzz"),
        (["train", RECIPE, "--lr", "3"], "no such option: --lr; a recipe's settings are key=value"),
        (["compare", RECIPE, "--reusme"], "(Possible options: --resume)"),
        (["compare", RECIPE, "--seeds", "0"],
         "invalid value for '--seeds': it must be greater than or equal to 1"),
        (["compare", RECIPE, "--seeds", "x"], "invalid value for '--seeds': it must be an integer"),
        (["compare", RECIPE, "--seeds"], "'--seeds' requires an argument"),
        (["train", "--resume=3", RECIPE], "'--resume' does not take a value"),
        (["check", "a", "b", "--tolerance", "nan"], "invalid value for '--tolerance'"),
        (["parity", "recipes/demo/student", "--tp", "0"], "invalid value for '--tp'"),
        (["eval", "recipes/demo/student", "--seed", "-1"], "invalid value for '--seed'"),
        (["status", "a", "b"], "unexpected extra argument"),
    ],
)  # fmt: skip
def test_command_lines(words, sentence, say):
    assert sentence in say(*words)


def test_help_is_grouped_and_begins_with_training(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["iwopd", "--help"])
    with pytest.raises(SystemExit) as left:
        cli.main()
    text = capsys.readouterr().out
    assert left.value.code == 0
    places = [text.index(f"─ {group} ─") for group in COMMANDS]
    assert places == sorted(places) and next(iter(COMMANDS)) == "Train"
    assert next(iter(COMMANDS["Train"])) == "train"
    names = [name for commands in COMMANDS.values() for name in commands]
    assert len(names) == len(set(names)) >= 18
    for commands in COMMANDS.values():
        for name, function in commands.items():
            assert f"│ {name} " in text
            assert function.__doc__.split("\n")[0].endswith("."), name


def test_more_processes_than_a_machine_can_have(say, tmp_path):
    line = say("train", RECIPE, "processes=100000", f"out={tmp_path}")
    assert "100000 processes are more than a machine can have" in line


def test_completion_installs_and_completes(tmp_path):
    """In a home folder of its own, by the shell that asks."""
    home, script = tmp_path / "home", f"{sys.executable} -W ignore -m iwopd_megatron"
    home.mkdir()
    env = os.environ | {"HOME": str(home)}

    def bash(line, **more):
        command = ["bash", "-c", f"{line}; exit $?"]
        done = subprocess.run(command, capture_output=True, text=True, env=env | more)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert "completion installed" in bash(f"{script} --install-completion")
    assert "iwopd.sh" in (home / ".bashrc").read_text()
    assert "_IWOPD_COMPLETE" in (home / ".bash_completions" / "iwopd.sh").read_text()
    asked = {"COMP_WORDS": "iwopd la", "COMP_CWORD": "1", "_IWOPD_COMPLETE": "complete_bash"}
    assert bash(script, **asked).split() == ["launch"]
