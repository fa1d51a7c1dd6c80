"""A role's part on one node: its commands, its environment, and what its agent tells the others."""

from __future__ import annotations

import signal
from dataclasses import dataclass, field
from typing import Any

from iwopd_megatron.launch.rendezvous import Rendezvous
from iwopd_megatron.launch.roles import Job, Role
from iwopd_megatron.runtime.services import outer_environment


@dataclass
class Node:
    """A role's part on one node. `index`: the node's number among the role's nodes."""

    job: Job
    role: Role
    index: int
    rendezvous: Rendezvous
    is_stopping: bool = False
    _said: dict[str, Any] = field(default_factory=dict)

    def watch_signals(self) -> None:
        """Have SIGTERM and SIGINT set `is_stopping`, which ends this node's part."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._stop)

    def _stop(self, number: int, frame: object) -> None:
        self.is_stopping = True

    def say(self, text: str) -> None:
        """Print a line into the role's log."""
        print(f"{self.role.name} node {self.index}: {text}", flush=True)

    def report(self, state: str, **more: Any) -> None:
        """Post the state of this part where it is not what was posted last."""
        line = {"state": state} | more
        if line != self._said:
            self._said = line
            self.rendezvous.status(self.role.name, self.index, **line)

    def command(self, port: int | None = None) -> list[str]:
        """Return the role's command with `port` in the place of {port}."""
        return [word.replace("{port}", str(port)) for word in self.role.command]

    def environment(self, place: int) -> dict[str, str]:
        """Return the environment of the node's process number `place`.

        A server sees its own GPUs only; ranks of a world see all of the node's.
        """
        env = outer_environment() | self.role.env
        if self.job.has_gpus and not self.role.is_world:
            visible = env.get("CUDA_VISIBLE_DEVICES") or ",".join(
                map(str, range(self.role.gpus_per_node))
            )
            first = place * self.role.gpus_each
            own = visible.split(",")[first : first + self.role.gpus_each]
            env["CUDA_VISIBLE_DEVICES"] = ",".join(own)
        return env
