"""A launch as its nodes read it: `job.json` in the launch folder, roles and what each one runs.

Written by `iwopd launch`, read by `agent.py` on every node. Standard library only.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

from iwopd_megatron.files.run_files import read_object

FILE = "job.json"
TRAINER = "trainer"


@dataclass(frozen=True)
class Role:
    """Processes of one kind, spread evenly over nodes.

    `is_world`: they are the ranks of one torch world and restart together; otherwise servers, each
    on its own. `{port}` in the command becomes a free port.
    """

    name: str
    processes: int
    per_node: int  # of them
    gpus_each: int
    command: list[str]
    is_world: bool = True
    urls_key: str = ""  # the trainer's recipe learns this role's URLs under this key
    env: dict[str, str] = field(default_factory=dict)
    max_restarts: int = 0
    ready_timeout_s: float = 1800.0
    hang_timeout_s: float = 60.0

    @property
    def nodes(self) -> int:
        return -(-self.processes // self.per_node)

    @property
    def gpus_per_node(self) -> int:
        return self.per_node * self.gpus_each

    @property
    def urls(self) -> int:
        """Addresses it answers at: one for a world, one for each server."""
        return 0 if not self.urls_key else 1 if self.is_world else self.processes


@dataclass(frozen=True)
class Job:
    """All roles, the trainer first: the job ends when the trainer does."""

    workdir: str
    roles: list[Role]
    gpus_per_node: int
    requeues: int = 0
    has_gpus: bool = True

    @property
    def fits_one_node(self) -> bool:
        """All roles may share one."""
        return len(self.roles) == 1 or (
            all(role.nodes == 1 for role in self.roles)
            and sum(role.gpus_per_node for role in self.roles) <= self.gpus_per_node
        )

    @property
    def machines(self) -> int:
        """Of a gang that no scheduler divides: one for all roles, or each role its own."""
        if self.fits_one_node:
            return self.roles[0].nodes
        return sum(role.nodes for role in self.roles)

    @property
    def services(self) -> list[Role]:
        return [role for role in self.roles if role.urls]

    def role(self, name: str) -> Role:
        return next(role for role in self.roles if role.name == name)

    def write(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / FILE).write_text(json.dumps(asdict(self), indent=1) + "\n")


def read_job(folder: Path) -> Job:
    """The job of a launch folder."""
    tree = read_object(folder / FILE)
    return Job(**tree | {"roles": [Role(**role) for role in tree["roles"]]})
