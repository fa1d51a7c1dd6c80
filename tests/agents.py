"""Agents of a launch, as real processes on small stand-ins for trainer and services.

A service answers 503 while there is a file "loading", and not at all on /health while there is one
"busy". A trainer takes a second to save when it is told to stop. The real ones: tests/with_slurm.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from iwopd_megatron.launch.rendezvous import Rendezvous
from iwopd_megatron.launch.roles import Job, Role

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
        self.rendezvous = Rendezvous(folder / "launch", 0)

    def start(self, *arguments: str) -> subprocess.Popen:
        env = {k: v for k, v in os.environ.items() if not k.startswith("SLURM")}
        env["PYTHONPATH"] = str(Path(__file__).parent.parent)
        command = [sys.executable, "-m", "iwopd_megatron.launch.agent", str(self.folder / "launch")]
        log = (self.folder / "agents.log").open("a")
        process = subprocess.Popen([*command, *arguments], env=env, stdout=log, stderr=log)
        self.running.append(process)
        return process

    def end(self, folder: Path) -> None:
        """All of it, whatever a failed test left running."""
        self.rendezvous.finish(9)
        try:
            for process in self.running:
                process.wait(30)
        finally:
            pids = [process.pid for process in self.running] + [int(s[1]) for s in starts(folder)]
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            (folder / "go").write_text("0")

    def log(self) -> str:
        return (self.folder / "agents.log").read_text()

    def status(self, role: str, node: int = 0) -> dict:
        return self.rendezvous.read(f"status/{role}-{node}.json") or {}


def until(is_so: Callable[[], Any], seconds: float = 60) -> Any:
    """What `is_so()` says once it says something true."""
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
