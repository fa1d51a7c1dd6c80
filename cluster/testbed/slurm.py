"""A real Slurm of four emulated nodes here: `slurm.py install | up FOLDER | down FOLDER`.

Needs root, for slurmd. All state, sockets and logs lie in FOLDER; `down` stops what `up` started
and nothing else, by the pid files there.

What it cannot show, for every node is this machine: wrong addresses, containers, device isolation,
NCCL and InfiniBand.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

HERE = Path(__file__).parent
NODES = ("n1", "n2", "n3", "n4")
PACKAGES = ("slurm-wlm", "munge", "slurmdbd", "mariadb-server")
PROGRAMS = ("slurmctld", "slurmd", "slurmdbd", "srun", "sacct", "munged", "mariadbd")


class TestbedError(RuntimeError):
    """Slurm cannot be installed or does not start here."""


def install() -> None:
    """Debian's packages, where they are not there yet (30 seconds)."""
    if all(shutil.which(name) for name in PROGRAMS):
        return
    if os.getuid() != 0 or not shutil.which("apt-get"):
        raise TestbedError("Slurm is not installed; it needs root and apt-get (Debian, Ubuntu).")
    quiet = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    for arguments in (["update"], ["install", "-y", "--no-install-recommends", *PACKAGES]):
        done = subprocess.run(["apt-get", "-q", *arguments], env=quiet, capture_output=True)
        if done.returncode != 0:
            last = (done.stderr or done.stdout).decode().strip().splitlines()[-1:]
            raise TestbedError(f"apt-get {arguments[0]} failed, so there is no Slurm: {last}")


class Testbed:
    """A Slurm in `root`; `env` is what its commands (sbatch, sacct, ...) need."""

    def __init__(self, root: Path):
        self.root = root.resolve()
        self.complaint = ""  # of the last command that was tried
        self.env = os.environ | {"SLURM_CONF": str(self.root / "etc" / "slurm.conf")}

    def up(self) -> None:
        """From nothing to four idle nodes (5 seconds); stops what it started if that fails."""
        try:
            self._write_folder()
            self._start_munge()
            self._start_database()
            self._run("slurmdbd")
            self._wait("slurmdbd", lambda: self._succeeds("sacctmgr", "-n", "list", "cluster"))
            self._run("slurmctld")
            for node in NODES:
                self._run("slurmd", "-N", node)
            self._wait("four idle nodes", self._is_idle)
        except BaseException:
            self.down()
            raise

    def down(self) -> None:
        """Stop all of it; slurmctld before slurmdbd, to which it writes at the end."""
        names = [
            *(f"slurmd.{node}" for node in NODES),
            "slurmctld",
            "slurmdbd",
            "mariadb",
            "munged",
        ]
        for name in names:
            file = self.root / "pids" / f"{name}.pid"
            if file.is_file() and file.read_text().strip():
                _stop(int(file.read_text()))
                file.unlink(missing_ok=True)

    def _write_folder(self) -> None:
        for name in ("etc", "munge", "pids", "log", "gpus", "mysql", "state/ctld"):
            (self.root / name).mkdir(parents=True, exist_ok=True)
        for node in NODES:
            (self.root / "state" / f"slurmd.{node}").mkdir(exist_ok=True)
        for index in range(8):
            device = self.root / "gpus" / f"gpu{index}"
            if not device.exists():
                os.mknod(device, 0o666 | stat.S_IFCHR, os.makedev(1, 3))  # as /dev/null
        ports = ["CTLD", "DBD", "SQL", *(node.upper() for node in NODES)]
        words = {
            f"{name}_PORT": str(port) for name, port in zip(ports, _free_ports(7), strict=True)
        }
        words |= {"ROOT": str(self.root), "HOST": socket.gethostname()}
        self.sql_port = words["SQL_PORT"]
        for name in ("slurm.conf", "gres.conf", "slurmdbd.conf"):
            text = (HERE / name).read_text()
            for word, value in words.items():
                text = text.replace(f"@{word}@", value)
            (self.root / "etc" / name).write_text(text)
            (self.root / "etc" / name).chmod(0o600)

    def _start_munge(self) -> None:
        folder = self.root / "munge"
        key = folder / "key"
        if not key.exists():
            key.touch(0o600)
            key.write_bytes(os.urandom(128))
        self._run(
            "munged",
            "--force",
            f"--key-file={key}",
            f"--socket={folder}/socket",
            f"--pid-file={self.root}/pids/munged.pid",
            f"--seed-file={folder}/seed",
            f"--log-file={self.root}/log/munged.log",
        )

    def _start_database(self) -> None:
        data, sock = self.root / "mysql", self.root / "mysql" / "socket"
        own = (f"--datadir={data}", f"--tmpdir={self.root}")  # in /tmp two would collide
        if not (data / "mysql").is_dir():
            self._run(
                "mariadb-install-db",
                "--no-defaults",
                "--user=root",
                *own,
                "--skip-test-db",
                "--auth-root-authentication-method=normal",
            )
        with (self.root / "log" / "mariadb.log").open("ab") as log:
            subprocess.Popen(
                [
                    "mariadbd",
                    "--no-defaults",
                    "--user=root",
                    *own,
                    f"--socket={sock}",
                    "--bind-address=127.0.0.1",
                    f"--port={self.sql_port}",
                    f"--pid-file={self.root}/pids/mariadb.pid",
                    "--innodb-buffer-pool-size=64M",
                    "--innodb-lock-wait-timeout=900",
                ],
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        client = ("mariadb", "--no-defaults", "--socket", str(sock))
        self._wait("mariadb", lambda: self._succeeds(*client, "-e", "select 1"))
        self._run(
            *client,
            "-e",
            "create database if not exists slurm_acct_db; "
            "create user if not exists slurm@'127.0.0.1' identified by 'slurm'; "
            "grant all on slurm_acct_db.* to slurm@'127.0.0.1'",
        )

    def _is_idle(self) -> bool:
        return self.output("sinfo", "-h", "-t", "idle", "-o", "%D").strip() == str(len(NODES))

    def output(self, *command: str) -> str:
        """What a Slurm command prints; empty where it fails."""
        done = subprocess.run(command, env=self.env, capture_output=True, text=True, timeout=60)
        return done.stdout if done.returncode == 0 else ""

    def _succeeds(self, *command: str) -> bool:
        done = subprocess.run(command, env=self.env, capture_output=True, text=True)
        self.complaint = done.stderr.strip()
        return done.returncode == 0

    def _run(self, *command: str) -> None:
        done = subprocess.run(command, env=self.env, capture_output=True, text=True)
        if done.returncode != 0:
            raise TestbedError(f"{command[0]} failed: {(done.stderr or done.stdout).strip()}")

    def _wait(self, what: str, is_there: Callable[[], bool], seconds: float = 60) -> None:
        end = time.monotonic() + seconds
        while not is_there():
            if time.monotonic() > end:
                raise TestbedError(
                    f"no {what} after {seconds:g} s: {self.complaint or 'no error'}; "
                    f"see {self.root}/log."
                )
            time.sleep(0.2)


def _free_ports(count: int) -> list[int]:
    """Below those that the kernel gives to connections, so that they stay free until used."""
    free = []
    for port in random.sample(range(17000, 32000), 20 * count):
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.bind(("127.0.0.1", port))
            free.append(port)
    return free[:count]


def _stop(pid: int, seconds: float = 30) -> None:
    """SIGTERM, and SIGKILL where that is not enough."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGTERM)
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            os.kill(pid, 0)
            if _is_zombie(pid):
                return
            time.sleep(0.1)
        os.kill(pid, signal.SIGKILL)


def _is_zombie(pid: int) -> bool:
    """A child of this process that has ended; nobody else sees one."""
    with contextlib.suppress(ChildProcessError):
        return os.waitpid(pid, os.WNOHANG)[0] == pid
    return False


if __name__ == "__main__":
    action, *folder = sys.argv[1:] or ["help"]
    if action == "install":
        install()
    elif action in ("up", "down") and len(folder) == 1:
        getattr(Testbed(Path(folder[0])), action)()
        print(f"export SLURM_CONF={Path(folder[0]).resolve()}/etc/slurm.conf")
    else:
        sys.exit(__doc__)
