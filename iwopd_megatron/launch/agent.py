"""One node's part of a launch: `python -m iwopd_megatron.launch.agent LAUNCH_FOLDER ROLE`.

Starts the role's processes on this node, restarts services that die, tells the trainer where they
are once they answer, and ends everything when the trainer ends. Needs no torch.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from iwopd_megatron.errors import EXIT_STOPPED, GateError, RecipeError, ServiceError
from iwopd_megatron.launch.agent_node import Node
from iwopd_megatron.launch.agent_world import World
from iwopd_megatron.launch.rendezvous import FINAL, POLL_SECONDS, Rendezvous, hostname
from iwopd_megatron.launch.roles import TRAINER, Job, Role, read_job
from iwopd_megatron.runtime.keeper import Keeper
from iwopd_megatron.runtime.services import Server, free_port
from iwopd_megatron.runtime.stop import die_with_parent

# A person must mend these; starting again would end the same way.
FINAL_CODES = {error.exit_code: error.__name__ for error in (RecipeError, GateError)}


def main() -> int:
    """Parse the command line, run this node's part and return its exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="launch folder, which holds job.json")
    parser.add_argument("role", help="one of its roles, or 'machine' for all that this one has")
    parser.add_argument("--node", type=int, help="place in the role, or in the gang of machines")
    parser.add_argument("--attempt", type=int, help="0 at the job's first start")
    parser.add_argument("--attached", action="store_true", help="die with the starting process")
    given = parser.parse_args()
    if given.attached:
        die_with_parent()
    job = read_job(given.folder)
    os.chdir(job.workdir)
    index = _number(given.node, "SLURM_NODEID", "SKYPILOT_NODE_RANK")
    attempt = _number(given.attempt, "SLURM_RESTART_COUNT")
    if given.role == "machine":
        return run_machine(given.folder, job, index, attempt)
    return run_role(Node(job, job.role(given.role), index, Rendezvous(given.folder, attempt)))


def _number(given: int | None, *scheduler: str) -> int:
    """Return the command line's number, else the first of the scheduler's variables, else 0."""
    if given is not None:
        return given
    return next((int(os.environ[name]) for name in scheduler if name in os.environ), 0)


def run_role(node: Node) -> int:
    """Run a role's part on this node until the role ends or the job is over; return the exit code.

    A trainer that ended with one of FINAL_CODES leaves the reason in the launch folder's FINAL.
    """
    node.watch_signals()
    node.report("starting")
    try:
        code = World(node).run() if node.role.is_world else _keep_servers(node)
    except ServiceError as error:
        node.say(f"error: {error}")
        code = error.exit_code
    if node.role.name == TRAINER and code in FINAL_CODES:
        sentence = f"the trainer ended with a {FINAL_CODES[code]}, which another start cannot mend"
        (node.rendezvous.launch / FINAL).write_text(sentence + "\n")
    over = node.rendezvous.finish(code)
    node.report("stopped" if over == EXIT_STOPPED else "failed" if over else "done", code=code)
    return over


def _keep_servers(node: Node) -> int:
    """Keep this node's servers running, each on its own, until the job is over; its exit code."""
    role = node.role
    servers: list[Server] = []
    first = node.index * role.per_node
    for number in range(first, min(first + role.per_node, role.processes)):
        port = free_port()
        log = node.rendezvous.folder / "logs" / f"{role.name}-{number}.log"
        url = f"http://127.0.0.1:{port}"
        env = node.environment(number - first)
        servers.append(Server(f"{role.name} {number}", node.command(port), env, log, url))
        node.rendezvous.post(f"{role.name}.url_{number}", f"http://{hostname()}:{port}")
    keeper = Keeper(servers, role.ready_timeout_s, role.max_restarts, role.hang_timeout_s, node.say)
    keeper.start()
    try:
        while node.rendezvous.finished is None and not node.is_stopping:
            state = "ready" if keeper.is_ready() else "starting"
            restarts = sum(one.restarts for one in keeper.watched)
            node.report(state, restarts=restarts, urls=[server.url for server in servers])
            time.sleep(POLL_SECONDS)
    finally:
        keeper.stop()
    return node.rendezvous.finished or 0


def run_machine(folder: Path, job: Job, index: int, attempt: int) -> int:
    """Run what machine `index` has of a job whose roles no Slurm places; return the exit code.

    The job is started again until it ends well, cannot, or was requeued `job.requeues` times. A
    single machine has every role; in a gang, roles have machines in their order.
    """
    parts = _parts(job, index)
    while True:
        code = _run_parts(folder, job, parts, attempt)
        is_over = code == 0 or (folder / FINAL).exists() or len(parts) < len(job.roles)
        if is_over or attempt >= job.requeues or code < 0:
            return abs(code)
        attempt += 1
        print(f"attempt {attempt} of {job.requeues} begins", flush=True)


def _parts(job: Job, index: int) -> list[tuple[Role, int]]:
    """Return the roles that a machine has, and its number among the nodes of each."""
    if job.fits_one_node and len(job.roles) > 1:
        return [(role, 0) for role in job.roles]
    places = [(role, node) for role in job.roles for node in range(role.nodes)]
    return [places[index]]


def _run_parts(folder: Path, job: Job, parts: list[tuple[Role, int]], attempt: int) -> int:
    """Run one attempt of a machine's roles; return the job's exit code.

    It is negative where a person or the machine asked to stop.
    """
    stopped: list[int] = []
    agents, first_gpu = [], 0
    for role, node in parts:
        env = dict(os.environ)
        if job.has_gpus and len(parts) > 1:
            own = range(first_gpu, first_gpu + role.gpus_per_node)
            env["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, own))
            first_gpu = own.stop
        command = [sys.executable, "-m", "iwopd_megatron.launch.agent", str(folder), role.name]
        command += ["--node", str(node), "--attempt", str(attempt), "--attached"]
        agents.append(subprocess.Popen(command, env=env, start_new_session=True))

    def stop(number: int, frame: object) -> None:
        stopped.append(number)
        agents[0].send_signal(signal.SIGTERM)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    codes = [agent.wait() for agent in agents]
    code = next((code for code in codes if code), 0)
    return -abs(code) if stopped else abs(code)


if __name__ == "__main__":
    sys.exit(main())
