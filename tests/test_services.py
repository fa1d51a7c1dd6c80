"""Servers beside a run: ready, dead at the start, restarted, hanging, gone with their parent."""

import os
import signal
import subprocess
import sys

import psutil
import pytest
from served import ROOT, wait_until

from iwopd_megatron.errors import ServiceError
from iwopd_megatron.runtime.keeper import Keeper
from iwopd_megatron.runtime.services import Server, free_port, outer_environment

HEALTHY = """
import http.server, subprocess, sys
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.send_header("content-length", "0"); self.end_headers()
    def log_message(self, *args): pass
subprocess.Popen(["sleep", "1000"])
print("listening", flush=True)
http.server.ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


def make_server(folder, code=HEALTHY):
    port = free_port()
    command = [sys.executable, "-c", code, str(port)]
    return Server("the server", command, None, folder / "logs/log", f"http://127.0.0.1:{port}")


def group(leader):
    """Living processes of a server's group: what starts it, the command, and its child."""
    own = []
    for process in psutil.process_iter():
        try:
            if os.getpgid(process.pid) == leader:
                own += [process.pid] if process.status() != psutil.STATUS_ZOMBIE else []
        except (psutil.NoSuchProcess, ProcessLookupError):
            pass
    return own


def test_start_wait_restart_stop(tmp_path):
    server = make_server(tmp_path)
    server.start()
    server.wait_ready(30)
    assert len(group(server.process.pid)) == 3 and server.last_line() == "listening"
    first = server.process
    server.restart()
    assert server.process is not first
    wait_until(lambda: group(first.pid) == [])
    server.wait_ready(30)
    server.kill(only=first)
    assert server.is_running
    server.stop()
    assert not server.is_running
    wait_until(lambda: group(server.process.pid) == [])  # children too
    assert server.log.read_text() == "listening\n" * 2


def test_death_before_it_is_ready_is_one_sentence_with_the_log(tmp_path):
    server = make_server(tmp_path, "import sys; print('no such model'); sys.exit(3)")
    server.start()
    with pytest.raises(ServiceError) as error:
        server.wait_ready(30)
    assert "the server ended with exit code 3 before it was ready" in str(error.value)
    assert str(error.value).endswith("is: no such model")
    slow = make_server(tmp_path / "slow", "import time; time.sleep(1000)")
    slow.start()
    with pytest.raises(ServiceError, match="not ready within 0.5 seconds; .* is: \\(empty\\)"):
        slow.wait_ready(0.5)
    slow.stop()


@pytest.fixture
def kept(tmp_path):
    server, said = make_server(tmp_path), []
    keeper = Keeper([server], 30, max_restarts=2, hang_timeout=1.0, say=said.append)
    keeper.start()
    keeper.wait_ready()
    yield server, keeper, said
    keeper.stop()
    keeper.stop()
    assert not server.is_running


def killed(server):
    pid = server.process.pid
    os.killpg(pid, signal.SIGKILL)
    wait_until(lambda: server.process.pid != pid and server.health() == 200)


def test_a_dead_server_is_restarted_a_bounded_number_of_times(kept):
    server, keeper, said = kept
    killed(server)
    wait_until(lambda: keeper.watched[0].is_up)
    killed(server)
    assert said[0] == "the server ended with exit code -9; restart 1 of 2."
    os.killpg(server.process.pid, signal.SIGKILL)
    wait_until(lambda: keeper.failure is not None)
    assert "ended with exit code -9 after 2 restarts; the last line of" in str(keeper.failure)
    with pytest.raises(ServiceError):
        keeper.is_ready()


def test_a_hanging_server_is_restarted(kept, monkeypatch):
    monkeypatch.setattr("iwopd_megatron.runtime.services.PROBE_SECONDS", 0.5)
    server, keeper, said = kept
    pid = server.process.pid
    os.killpg(pid, signal.SIGSTOP)
    wait_until(lambda: server.process.pid != pid and server.health() == 200)
    assert said == ["the server has not answered for 1 seconds; restart 1 of 2."]


def test_a_server_that_never_was_ready_is_not_restarted(tmp_path):
    server = make_server(tmp_path, "import sys; print('error: wrong key.'); sys.exit(2)")
    keeper = Keeper([server], 30)
    keeper.start()
    with pytest.raises(ServiceError, match="ended with exit code 2; .* is: error: wrong key"):
        keeper.wait_ready()
    keeper.stop()


PARENT = """
import sys, time
from pathlib import Path
from iwopd_megatron.runtime.services import Server
from iwopd_megatron.runtime.keeper import Keeper
code, port, log = sys.argv[1:]
server = Server("s", [sys.executable, "-c", code, port], None, Path(log), f"http://127.0.0.1:{port}")
keeper = Keeper([server], 30)
keeper.start()
keeper.wait_ready()
print(server.process.pid, flush=True)
time.sleep(1000)
"""


def test_a_server_dies_with_the_process_that_started_it(tmp_path):
    command = [sys.executable, "-c", PARENT, HEALTHY, str(free_port()), str(tmp_path / "log")]
    parent = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    pid = int(parent.stdout.readline())
    assert len(group(pid)) == 3
    parent.kill()
    parent.wait()
    wait_until(lambda: group(pid) == [])  # the command's own children too


def test_a_server_is_no_rank_of_the_run(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "TORCHELASTIC_RUN_ID", "GROUP_RANK"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    env = outer_environment()
    assert not env.keys() & {"RANK", "WORLD_SIZE", "TORCHELASTIC_RUN_ID", "GROUP_RANK"}
    assert env["OMP_NUM_THREADS"] == "1" and "PATH" in env
