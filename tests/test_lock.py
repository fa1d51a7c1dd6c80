"""One run a folder: a living one is respected, a dead one's lock is taken over."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from iwopd_megatron.errors import RecipeError
from iwopd_megatron.files import lock

ROOT = Path(__file__).parent.parent


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the folder."""
    script = (
        "import pathlib, signal, sys\n"
        "from iwopd_megatron.files.lock import locked\n"
        "with locked(pathlib.Path(sys.argv[1])):\n"
        "    print('held', flush=True); signal.pause()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def test_a_second_run_is_refused_in_a_sentence(holder, tmp_path):
    command = [
        sys.executable,
        "-W",
        "ignore",
        "-m",
        "iwopd_megatron",
        "train",
        "recipes/demo_tiny_moe.yaml",
        f"out={tmp_path}",
        "--resume",
    ]
    done = subprocess.run(command, cwd=ROOT, env=os.environ, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith(
        f"error: {tmp_path} is in use by process {holder.pid} on {socket.gethostname()};"
    )
    assert os.listdir(tmp_path) == [lock.NAME]


def test_the_lock_of_a_killed_run_is_taken_over(holder, tmp_path):
    with pytest.raises(RecipeError, match="is in use"), lock.locked(tmp_path):
        pass
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    with lock.locked(tmp_path):
        assert f" {os.getpid()}" in (tmp_path / lock.NAME).read_text()
    assert (tmp_path / lock.NAME).read_text() == ""


@pytest.mark.parametrize(
    ("host", "pid", "is_refused"),
    [(socket.gethostname(), 1, True), (socket.gethostname(), 2**22 - 1, False), ("n7", 5, True)],
)
def test_without_kernel_locks_the_text_decides(host, pid, is_refused, tmp_path, monkeypatch):
    def no_locks(*args):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(lock.fcntl, "lockf", no_locks)
    (tmp_path / lock.NAME).write_text(f"{host} {pid}\n")
    if is_refused:
        with pytest.raises(RecipeError, match=f"by process {pid} on {host}"):
            with lock.locked(tmp_path):
                pass
    else:
        with lock.locked(tmp_path):
            pass
