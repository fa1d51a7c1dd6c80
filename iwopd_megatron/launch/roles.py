"""A launch as its nodes read it: `job.json` in the launch folder has every role and its command.

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
        """Return how many nodes the role's processes fill."""
        return -(-self.processes // self.per_node)

    @property
    def gpus_per_node(self) -> int:
        """Return the GPUs that the role takes of each of its nodes."""
        return self.per_node * self.gpus_each

    @property
    def urls(self) -> int:
        """Return at how many addresses it answers: one for a world, one for each server."""
        return 0 if not self.urls_key else 1 if self.is_world else self.processes


@dataclass(frozen=True)
class Job:
    """What one launch submits to a cluster: all roles, the trainer first.

    The job ends when the trainer does. `workdir`: the folder that every process runs in.
    """

    workdir: str
    roles: list[Role]
    gpus_per_node: int
    requeues: int = 0
    has_gpus: bool = True

    @property
    def fits_one_node(self) -> bool:
        """Return whether one node has GPUs enough for all roles, none of which needs several."""
        return len(self.roles) == 1 or (
            all(role.nodes == 1 for role in self.roles)
            and sum(role.gpus_per_node for role in self.roles) <= self.gpus_per_node
        )

    @property
    def machines(self) -> int:
        """Return how many machines a gang has that no scheduler divides among the roles.

        One for all roles where they fit it; otherwise each role has machines of its own.
        """
        if self.fits_one_node:
            return self.roles[0].nodes
        return sum(role.nodes for role in self.roles)

    @property
    def services(self) -> list[Role]:
        """Return the roles that the trainer calls: teachers and rollout servers."""
        return [role for role in self.roles if role.urls]

    def role(self, name: str) -> Role:
        """Return the role of this name."""
        return next(role for role in self.roles if role.name == name)

    def write(self, folder: Path) -> None:
        """Write job.json into a launch folder, which is made if it is not there."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / FILE).write_text(json.dumps(asdict(self), indent=1) + "\n")


def read_job(folder: Path) -> Job:
    """Return the job that a launch folder's job.json describes."""
    tree = read_object(folder / FILE)
    return Job(**tree | {"roles": [Role(**role) for role in tree["roles"]]})
