"""A role's part on one node, as its agent sees it."""

from __future__ import annotations

import signal
from dataclasses import dataclass, field
from typing import Any

from iwopd_megatron.launch.rendezvous import Board
from iwopd_megatron.launch.roles import Job, Role
from iwopd_megatron.runtime.services import outer_environment


@dataclass
class Node:
    """A role's part on one node."""

    job: Job
    role: Role
    index: int
    board: Board
    is_stopping: bool = False
    _said: dict[str, Any] = field(default_factory=dict)

    def watch_signals(self) -> None:
        """SIGTERM asks this node's part to end."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._stop)

    def _stop(self, number: int, frame: object) -> None:
        self.is_stopping = True

    def say(self, text: str) -> None:
        print(f"{self.role.name} node {self.index}: {text}", flush=True)

    def report(self, state: str, **more: Any) -> None:
        """Post the state where it is news."""
        line = {"state": state} | more
        if line != self._said:
            self._said = line
            self.board.status(self.role.name, self.index, **line)

    def command(self, port: int | None = None) -> list[str]:
        return [word.replace("{port}", str(port)) for word in self.role.command]

    def environment(self, place: int) -> dict[str, str]:
        """Of the process at this place of the node; a server sees its own GPUs only."""
        env = outer_environment() | self.role.env
        if self.job.has_gpus and not self.role.is_world:
            visible = env.get("CUDA_VISIBLE_DEVICES") or ",".join(
                map(str, range(self.role.gpus_per_node))
            )
            first = place * self.role.gpus_each
            own = visible.split(",")[first : first + self.role.gpus_each]
            env["CUDA_VISIBLE_DEVICES"] = ",".join(own)
        return env
