"""What a user has on the testbed: `iwopd launch` and its kin, and sacct."""

import json
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT / "cluster" / "testbed"))

from slurm import Testbed

LAUNCHER = ROOT / "build" / "cluster-venv" / "bin" / "python"
PROFILE = f"""
executor: slurm
gpu: h100-80  # character devices that no process may look for, hence CUDA_VISIBLE_DEVICES
gpus_per_node: 2
python: {sys.executable}
env: {{CUDA_VISIBLE_DEVICES: "", GLOO_SOCKET_IFNAME: lo, OMP_NUM_THREADS: "1"}}
requeues: 3
slurm:
  account: test
  partition: batch
  time: "00:30:00"
  warning_s: 60
  exclusive: false
  mem: null
  srun_args: ["--mpi=none"]
"""


class Cluster:
    """The commands a user has, and what they say."""

    def __init__(self, bed: Testbed, folder: Path):
        self.bed, self.profile = bed, folder / "slurm.yaml"
        self.profile.write_text(PROFILE)

    def launch(
        self, *arguments: str, command: str = "launch", **env: str
    ) -> subprocess.CompletedProcess:
        command = [LAUNCHER, "-W", "ignore", "-m", "iwopd_megatron", command, *arguments]
        command += ["--cluster", str(self.profile)]
        env = self.bed.env | {"PYTHONPATH": str(ROOT)} | env
        return subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True)

    def iwopd(self, *arguments: str) -> str:
        command = [LAUNCHER, "-W", "ignore", "-m", "iwopd_megatron", *arguments]
        return subprocess.run(
            command, env=self.bed.env, cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout

    def status(self, run: Path) -> dict[str, Any]:
        return json.loads(self.iwopd("status", str(run), "--json"))

    def submit(self, *arguments: str) -> str:
        """The job's number."""
        done = self.launch(*arguments, "--no-rehearsal")  # its GPUs are none
        assert done.returncode == 0, done.stderr
        return re.search(r"job (\d+) launched", done.stdout)[1]

    def jobs(self, *more: str) -> list[list[str]]:
        """[number, state] of every start of every job's first group, oldest first."""
        table = self.bed.output("sacct", "-nPDX", "-o", "JobID,State", *more)
        rows = [line.split("|") for line in table.splitlines()]
        first = [(job, state) for job, state in rows if "+" not in job or job.endswith("+0")]
        return [[job.partition("+")[0], state.split()[0]] for job, state in first]

    def states(self, job: str) -> list[str]:
        return [state for _, state in self.jobs("-j", job)]


def until(is_so: Callable[[], Any], seconds: float = 420, every: float = 1.0) -> Any:
    """What `is_so()` says once it says something true; a failure after `seconds`."""
    end = time.monotonic() + seconds
    while not (value := is_so()):
        assert time.monotonic() < end, f"it did not happen in {seconds} s"
        time.sleep(every)
    return value
