"""The ranks of one torch world, over all nodes of a role: they start and restart together.

Node 0 posts where the ranks meet, and, for the trainer, the addresses of the services once all of
them answer. The node that loses a rank says so, and every node starts its ranks again.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from typing import Any

from iwopd_megatron.errors import EXIT_STOPPED, ServiceError
from iwopd_megatron.launch.agent_node import Node
from iwopd_megatron.launch.rendezvous import POLL_SECONDS, hostname
from iwopd_megatron.launch.roles import Role
from iwopd_megatron.runtime.services import free_port, health, is_answering

GRACE_SECONDS = 10  # for the other ranks of a node to end after one did


class World:
    """One node's ranks of a role's torch world, started again while restarts are left."""

    def __init__(self, node: Node):
        self.node, self.role, self.rendezvous = node, node.role, node.rendezvous
        self.port = free_port()
        self.restart = 0
        self.was_ready = False

    def run(self) -> int:
        """Run the ranks to their end; return their last exit code, or the job's if it ends first.

        ServiceError where a service does not get ready in time.
        """
        if self.node.index == 0 and self.role.urls:
            self.rendezvous.post(f"{self.role.name}.url_0", f"http://{hostname()}:{self.port}")
        while True:
            code = self._run_once()
            if self.rendezvous.finished is not None or self.node.is_stopping:
                return code
            if self.role.urls:  # whatever it says, a service that ended is missing
                code = code or ServiceError.exit_code
            elif code in (0, EXIT_STOPPED):
                return code
            if self.restart == self.role.max_restarts or (self.role.urls and not self.was_ready):
                return code
            self.restart += 1
            self.node.say(
                f"ended with exit code {code}; restart {self.restart} of {self.role.max_restarts}."
            )

    def _run_once(self) -> int:
        meeting = self._meet()
        if meeting is None:
            return self._code_elsewhere()
        ranks = [self._start(place, meeting) for place in range(self.role.per_node)]
        try:
            return self._watch(ranks)
        finally:
            for rank in ranks:
                _kill(rank)

    def _name(self, what: str) -> str:
        return f"{self.role.name}.{what}_{self.restart}"

    def _meet(self) -> dict[str, Any] | None:
        """Return host, port and overrides of this start; None where it failed elsewhere first."""
        if self.node.index == 0:
            try:
                overrides = self._wait_for_services()
            except ServiceError:
                self.rendezvous.post(self._name("failed"), ServiceError.exit_code)
                raise
            if overrides is not None:
                meeting = {"host": hostname(), "port": free_port(), "overrides": overrides}
                self.rendezvous.post(self._name("world"), meeting)
                return meeting
        while (meeting := self.rendezvous.read(self._name("world"))) is None:
            if self._is_over():
                return None
            time.sleep(POLL_SECONDS)
        return meeting

    def _wait_for_services(self) -> list[str] | None:
        """Return overrides with the services' addresses; None where the job is over before."""
        if self.role.urls:
            return []
        overrides = []
        for service in self.node.job.services:
            urls = []
            for number in range(service.urls):
                url = self._wait_for(service, number)
                if url is None:
                    return None
                urls.append(url)
            overrides.append(f"{service.urls_key}=[{','.join(urls)}]")
            if not service.is_world:  # rollout servers, which take weights from rank 0
                overrides.append(f"rollout.sync_address={hostname()}")
        return overrides

    def _wait_for(self, service: Role, number: int) -> str | None:
        """Return a service's address once it is ready; None where the job is over before.

        ServiceError where it is not ready in time.
        """
        self.node.report("waiting", detail=f"for {service.name} {number}")
        end = time.monotonic() + service.ready_timeout_s
        while not (self._is_over() or self._must_stop):
            url = self.rendezvous.read(f"{service.name}.url_{number}")
            status = health(url) if url else None
            if status == 200:
                return url
            if time.monotonic() > end:
                found = "no node has said where it is" if not url else f"{url}/health: {status}"
                raise ServiceError(
                    f"{service.name} {number} of {service.urls} is not ready after "
                    f"{service.ready_timeout_s:g} seconds ({found}); its log says why."
                )
            time.sleep(POLL_SECONDS)
        return None

    def _start(self, place: int, meeting: dict[str, Any]) -> subprocess.Popen[bytes]:
        """Start the node's rank number `place`, in a process group of its own."""
        own = {
            "RANK": self.node.index * self.role.per_node + place,
            "LOCAL_RANK": place,
            "WORLD_SIZE": self.role.processes,
            "LOCAL_WORLD_SIZE": self.role.per_node,
            "MASTER_ADDR": meeting["host"],
            "MASTER_PORT": meeting["port"],
        }
        env = self.node.environment(place) | {name: str(value) for name, value in own.items()}
        command = [*self.node.command(self.port), *meeting["overrides"]]
        return subprocess.Popen(command, env=env, start_new_session=True)

    def _watch(self, ranks: list[subprocess.Popen[bytes]]) -> int:
        """Wait until every rank ended well, or one did not, here or elsewhere; return the code."""
        heard = began = time.monotonic()
        told = is_ready = False
        while True:
            codes = [rank.poll() for rank in ranks]
            ended = [code for code in codes if code is not None]
            if all(code is not None for code in codes):
                return self._fail(ended)
            if any(code not in (0, EXIT_STOPPED) for code in ended):
                return self._fail(_wait(ranks))
            if self._is_over():
                return self._code_elsewhere()
            if self._must_stop and not told:
                told = True
                self._ask_to_stop(ranks)
            if self.role.urls and self.node.index == 0:
                url, now = f"http://127.0.0.1:{self.port}", time.monotonic()
                if is_answering(url) if is_ready else health(url) == 200:
                    is_ready = self.was_ready = True
                    heard = now
                late = not is_ready and now - began > self.role.ready_timeout_s
                if late or (is_ready and now - heard > self.role.hang_timeout_s):
                    self.node.say("is not ready in time" if late else "does not answer any more")
                    return self._fail([ServiceError.exit_code])
            elif self.role.urls:
                self.was_ready = True  # node 0 knows
            state = "running" if not self.role.urls else "ready" if is_ready else "starting"
            pids = [rank.pid for rank in ranks]
            self.node.report(state, restarts=self.restart, pids=pids)
            time.sleep(POLL_SECONDS)

    @property
    def _must_stop(self) -> bool:
        """Return whether to stop: this node was told to, or the trainer heard the time limit.

        Services run on, for the trainer needs them to its end.
        """
        return self.node.is_stopping or (not self.role.urls and self.rendezvous.stop_requested)

    def _ask_to_stop(self, ranks: list[subprocess.Popen[bytes]]) -> None:
        """Send SIGTERM to the ranks, unless Slurm did: a second signal would end them unsaved."""
        if self.node.is_stopping and "SLURM_JOB_ID" in os.environ:
            return
        self.node.say("asks its ranks to save and stop")
        for rank in ranks:
            rank.send_signal(signal.SIGTERM)

    def _fail(self, codes: list[int]) -> int:
        """Return the exit code that says most, and post it for other nodes if it is a failure."""
        bad = [code for code in codes if code not in (0, EXIT_STOPPED)]
        said = [code for code in bad if code > 1]  # rather a reason than a lost connection
        code = next(iter(said or bad), max(codes))
        code = 128 - code if code < 0 else code
        if bad:
            self.rendezvous.post(self._name("failed"), code)
        return code

    def _is_over(self) -> bool:
        """Return whether this start failed on some node, or the job has ended."""
        return self.rendezvous.has(self._name("failed")) or self.rendezvous.finished is not None

    def _code_elsewhere(self) -> int:
        """Return the exit code of a start that ended though no rank here did."""
        for code in (self.rendezvous.read(self._name("failed")), self.rendezvous.finished):
            if code is not None:
                return code
        return EXIT_STOPPED


def _wait(ranks: list[subprocess.Popen[bytes]]) -> list[int]:
    """Return the exit codes of ranks that end within GRACE_SECONDS; others are left out."""
    end = time.monotonic() + GRACE_SECONDS
    while any(rank.poll() is None for rank in ranks) and time.monotonic() < end:
        time.sleep(0.1)
    return [rank.returncode for rank in ranks if rank.returncode is not None]


def _kill(rank: subprocess.Popen[bytes]) -> None:
    """Send SIGKILL to a rank's process group and reap the rank."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(rank.pid, signal.SIGKILL)
    rank.wait()
