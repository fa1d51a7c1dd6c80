"""Agents of a launch, as real processes on small stand-ins for trainer and services.

A service answers 503 while there is a file "loading", and not at all on /health while there is one
"busy". A trainer takes a second to save when it is told to stop. The real ones: tests/with_slurm.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from iwopd_megatron.board import Board
from iwopd_megatron.roles import Job, Role

SERVICE = """
import http.server, os, sys, time
if os.environ.get("RANK", "0") != "0":
    time.sleep(600)
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        while self.path == "/health" and os.path.exists(sys.argv[2] + "/busy"):
            time.sleep(0.1)
        self.send_response(503 if os.path.exists(sys.argv[2] + "/loading") else 200)
        self.end_headers()
    def log_message(self, *words): pass
open(sys.argv[2] + "/started", "a").write(os.environ.get("RANK", "-") + f" {os.getpid()}\\n")
http.server.ThreadingHTTPServer(("", int(sys.argv[1])), Handler).serve_forever()
"""
# Writes what it was given, waits for the file "go", ends with the code in it.
TRAINER = """
import json, os, pathlib, signal, sys, time
folder = pathlib.Path(sys.argv[1])
def stop(*_):
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    time.sleep(1.5)
    sys.exit(75)
signal.signal(signal.SIGTERM, stop)
rank = os.environ["RANK"]
keys = ("WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT")
told = {"arguments": sys.argv[2:], "env": {k: os.environ[k] for k in keys}, "pid": os.getpid()}
(folder / f"rank_{rank}").write_text(json.dumps(told))
while not (folder / "go").exists():
    time.sleep(0.05)
sys.exit(int((folder / "go").read_text()))
"""


def service(folder: Path, name: str, **more) -> Role:
    script = folder / "service.py"
    script.write_text(SERVICE)
    settings = {"processes": 1, "per_node": 1, "urls_key": f"{name}.urls", "max_restarts": 2}
    settings |= {"ready_timeout_s": 60} | more
    command = [sys.executable, str(script), "{port}", str(folder)]
    return Role(name, gpus_each=1, command=command, **settings)


def trainer(folder: Path, **more) -> Role:
    script = folder / "trainer.py"
    script.write_text(TRAINER)
    settings = {"processes": 2, "per_node": 2} | more
    command = [sys.executable, str(script), str(folder)]
    return Role("trainer", gpus_each=1, command=command, **settings)


class Agents:
    """The agents of a job, started one by one."""

    def __init__(self, folder: Path, *roles: Role, requeues: int = 0):
        self.folder, self.running = folder, []
        Job(str(folder), list(roles), 8, requeues, has_gpus=False).write(folder / "launch")
        self.board = Board(folder / "launch", 0)

    def start(self, *arguments: str) -> subprocess.Popen:
        env = {k: v for k, v in os.environ.items() if not k.startswith("SLURM")}
        env["PYTHONPATH"] = str(Path(__file__).parent.parent)
        command = [sys.executable, "-m", "iwopd_megatron.agent", str(self.folder / "launch")]
        log = (self.folder / "agents.log").open("a")
        process = subprocess.Popen([*command, *arguments], env=env, stdout=log, stderr=log)
        self.running.append(process)
        return process

    def log(self) -> str:
        return (self.folder / "agents.log").read_text()

    def status(self, role: str, node: int = 0) -> dict:
        return self.board.read(f"status/{role}-{node}.json") or {}


@pytest.fixture
def agents(tmp_path):
    made = []

    def make(*roles: Role, requeues: int = 0) -> Agents:
        made.append(Agents(tmp_path, *roles, requeues=requeues))
        return made[-1]

    yield make
    for one in made:
        one.board.finish(9)
        for process in one.running:
            process.wait(30)


def until(is_so, seconds: float = 60):
    end = time.monotonic() + seconds
    while not (value := is_so()):
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.05)
    return value


def told(folder: Path, rank: int) -> dict:
    def read():
        text = (folder / f"rank_{rank}").read_text() if (folder / f"rank_{rank}").exists() else ""
        return json.loads(text) if text else None

    return until(read)


def starts(folder: Path) -> list[list[str]]:
    file = folder / "started"
    return [line.split() for line in file.read_text().splitlines()] if file.exists() else []


def test_trainer_waits_for_services_and_learns_their_addresses(agents, tmp_path):
    roles = [
        trainer(tmp_path, processes=4, per_node=2),
        service(tmp_path, "teacher"),
        service(tmp_path, "rollout", processes=2, per_node=2, is_world=False),
    ]
    job = agents(*roles)
    trainers = [job.start("trainer", "--node", str(node)) for node in (0, 1)]
    until(lambda: job.status("trainer").get("detail") == "for teacher 0")
    assert not (tmp_path / "rank_0").exists()
    (tmp_path / "loading").touch()
    teacher = job.start("teacher")
    until(lambda: starts(tmp_path))
    rollout = job.start("rollout")
    until(lambda: len(starts(tmp_path)) == 3)
    assert job.status("trainer")["detail"] == "for teacher 0"
    (tmp_path / "loading").unlink()
    ranks = [told(tmp_path, rank) for rank in range(4)]
    assert len({rank["env"]["MASTER_PORT"] for rank in ranks}) == 1
    assert [rank["env"]["LOCAL_RANK"] for rank in ranks] == ["0", "1", "0", "1"]
    given = dict(word.split("=") for word in ranks[3]["arguments"])
    assert given["teacher.urls"].startswith("[http://")
    assert given["rollout.urls"].count("http://") == 2
    (tmp_path / "go").write_text("0")
    assert [p.wait(60) for p in (*trainers, teacher, rollout)] == [0, 0, 0, 0]
    until(lambda: job.status("teacher").get("state") == "done")


def test_service_that_never_gets_ready_is_named(agents, tmp_path):
    roles = [trainer(tmp_path), service(tmp_path, "teacher", ready_timeout_s=1)]
    job = agents(*roles)
    assert job.start("trainer").wait(60) == 4
    assert "teacher 0 of 1 is not ready after 1 seconds (no node has said where" in job.log()


def test_world_over_two_nodes_restarts_together(agents, tmp_path):
    roles = [trainer(tmp_path), service(tmp_path, "teacher", processes=2, per_node=1)]
    job = agents(*roles)
    nodes = [job.start("teacher", "--node", str(node)) for node in (0, 1)]
    until(lambda: job.status("teacher").get("state") == "ready")
    first = job.board.read("teacher.world_0")["port"]
    os.kill(int(starts(tmp_path)[0][1]), signal.SIGKILL)
    until(lambda: len(starts(tmp_path)) == 2 and job.status("teacher").get("restarts") == 1)
    until(lambda: job.status("teacher", 1).get("restarts") == 1)
    assert job.board.read("teacher.world_1")["port"] != first
    assert all(node.poll() is None for node in nodes)


def test_service_that_keeps_dying_ends_the_job(agents, tmp_path):
    job = agents(trainer(tmp_path), service(tmp_path, "teacher", max_restarts=1))
    teacher, train = job.start("teacher"), job.start("trainer")
    told(tmp_path, 0)
    for count in (1, 2):
        until(lambda count=count: len(starts(tmp_path)) == count)
        until(lambda count=count: job.status("teacher") == job.status("teacher") | {
            "state": "ready", "restarts": count - 1})  # fmt: skip
        os.kill(int(starts(tmp_path)[-1][1]), signal.SIGKILL)
    assert teacher.wait(60) == train.wait(60) == 128 + signal.SIGKILL


def test_servers_restart_one_by_one(agents, tmp_path):
    rollout = service(tmp_path, "rollout", processes=2, per_node=2, is_world=False)
    job = agents(trainer(tmp_path), rollout)
    job.start("rollout")
    until(lambda: job.status("rollout").get("state") == "ready")
    os.kill(int(starts(tmp_path)[0][1]), signal.SIGKILL)
    until(lambda: len(starts(tmp_path)) == 3)
    until(lambda: job.status("rollout").get("restarts") == 1)


@pytest.mark.parametrize("is_world", [True, False])
def test_busy_service_is_not_taken_for_a_hung_one(agents, tmp_path, is_world):
    """SGLang's /health hangs while weights change, and probes give up after 5 seconds."""
    role = service(tmp_path, "teacher", is_world=is_world, hang_timeout_s=1)
    job = agents(trainer(tmp_path), role)
    job.start("teacher")
    until(lambda: job.status("teacher").get("state") == "ready")
    (tmp_path / "busy").touch()
    time.sleep(13)  # two probes
    assert "restart 1 of" not in job.log()
    os.kill(int(starts(tmp_path)[0][1]), signal.SIGSTOP)
    (tmp_path / "busy").unlink()
    until(lambda: len(starts(tmp_path)) == 2)


def test_warning_stops_the_trainer_and_nothing_else(agents, tmp_path):
    job = agents(trainer(tmp_path), service(tmp_path, "teacher"))
    teacher, train = job.start("teacher"), job.start("trainer")
    told(tmp_path, 1)
    (job.board.folder / "stop").touch()
    assert train.wait(60) == 75
    assert teacher.wait(60) == 75  # the job's code, once the trainer has decided it
    assert "asks its ranks to save and stop" in job.log()
    assert job.log().count("asks its ranks") == 1


@pytest.mark.parametrize(("code", "final"), [(2, True), (3, True), (1, False), (4, False)])
def test_what_only_a_person_can_mend_is_final(agents, tmp_path, code, final):
    job = agents(trainer(tmp_path))
    (tmp_path / "go").write_text(str(code))
    assert job.start("trainer").wait(60) == code
    assert (tmp_path / "launch" / "final.txt").exists() is final


def test_machine_runs_all_roles_and_starts_them_again(agents, tmp_path):
    job = agents(trainer(tmp_path), service(tmp_path, "teacher"), requeues=1)
    machine = job.start("machine")
    os.kill(told(tmp_path, 0)["pid"], signal.SIGKILL)
    until(lambda: "attempt 1 of 1 begins" in job.log())
    (tmp_path / "go").write_text("0")
    assert machine.wait(60) == 0
    assert len(starts(tmp_path)) == 2


def test_machine_asked_to_stop_does_not_begin_again(agents, tmp_path):
    job = agents(trainer(tmp_path), service(tmp_path, "teacher"), requeues=5)
    machine = job.start("machine")
    told(tmp_path, 1)
    machine.send_signal(signal.SIGTERM)
    assert machine.wait(60) == 75
    assert "begins" not in job.log()
