"""What others import stays importable where it is, and a pure loss brings no Megatron."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NAMES = (
    ("iwopd_megatron.weighting", "token_weights"),
    ("iwopd_megatron.weighting", "token_weights_packed"),
    ("iwopd_megatron.loss", "opd_advantage"),
    ("iwopd_megatron.loss", "policy_loss"),
    ("iwopd_megatron.loss", "token_weights"),
    ("iwopd_megatron.loss", "token_weights_packed"),
    ("iwopd_megatron.loss", "linear_logprobs"),
    ("iwopd_megatron.logprobs", "linear_logprobs"),
)
COMMANDS = (
    "train",
    "sft",
    "doctor",
    "parity",
    "toy-task",
    "text-task",
    "compare",
    "convert",
    "export",
    "check",
    "prune",
    "data",
    "eval",
    "grade",
    "launch",
    "status",
    "attach",
    "serve-rollout",
    "plan",
    "rehearse",
    "report",
    "prefixes",
    "serve-teacher",
    "init",
)
SCRIPTS = ("hf_to_megatron.py", "megatron_to_hf.py", "check.py")


@pytest.mark.parametrize("module, name", NAMES)
def test_a_public_name_is_where_it_was(module, name):
    assert callable(getattr(__import__(module, fromlist=[name]), name))


def test_the_loss_room_exports_what_it_says():
    import iwopd_megatron.loss as loss

    with pytest.raises(AttributeError, match="has no attribute 'policy_losses'"):
        loss.policy_losses  # noqa: B018
    names: dict[str, object] = {}
    exec("from iwopd_megatron.loss import *", names)
    assert set(loss.__all__) <= set(names)


def test_the_loss_of_a_padded_batch_brings_no_megatron():
    code = (
        "import sys, torch; from iwopd_megatron.loss import opd_advantage, policy_loss;"
        "from iwopd_megatron.loss import token_weights;"
        "print([m for m in ('megatron', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_answers(command):
    from typer.testing import CliRunner

    from iwopd_megatron.cli.main import app

    done = CliRunner().invoke(app, [command, "--help"])
    assert done.exit_code == 0, done.output
    assert command in done.output


def test_no_command_is_missing_from_the_list():
    from typer.main import get_command

    from iwopd_megatron.cli.main import app

    assert sorted(get_command(app).commands) == sorted(COMMANDS)


@pytest.mark.parametrize("script", SCRIPTS)
def test_conversion_scripts_answer(script):
    command = [sys.executable, ROOT / "conversion" / script, "--help"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
