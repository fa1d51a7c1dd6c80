"""The recipe's cluster section: which GPUs a recipe was laid out for, and how roles share them.

Names no site: account, partition, container and mounts are the launch's cluster profile.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from iwopd_megatron.config.models import NonNegativeInt, PositiveInt, Section, Service
from iwopd_megatron.errors import RecipeError

ROLES = ("trainer", "teacher", "rollout")


class Cluster(Section):
    """GPUs of each role: whole nodes, or a part of a node that other roles may share."""

    gpu: Literal["h100-80", "h200", "b200", "h20", "a100"] = Field(
        "h100-80", description="kind of every GPU, for the plan"
    )
    gpus_per_node: PositiveInt = Field(8, description="GPUs of one machine")
    trainer: PositiveInt = Field(description="GPUs of the trainer's world")
    teacher: NonNegativeInt = Field(0, description="GPUs of the teacher service; 0: embedded")
    rollout: NonNegativeInt = Field(0, description="GPUs of the rollout servers; 0: embedded")

    @property
    def gpus(self) -> int:
        """GPUs of all roles."""
        return self.trainer + self.teacher + self.rollout

    @property
    def nodes(self) -> list[dict[str, int]]:
        """GPUs of each role on every node: whole nodes first, parts of nodes packed together."""
        whole: list[dict[str, int]] = []
        shared: list[dict[str, int]] = []
        for role in sorted(ROLES, key=lambda role: -getattr(self, role)):
            gpus = getattr(self, role)
            whole += [{role: self.gpus_per_node}] * (gpus // self.gpus_per_node)
            rest = gpus % self.gpus_per_node
            room = [n for n in shared if sum(n.values()) + rest <= self.gpus_per_node]
            if rest and room:
                room[0][role] = rest
            elif rest:
                shared.append({role: rest})
        return whole + shared

    @property
    def uneven_roles(self) -> list[str]:
        """Roles larger than a node that do not fill their last one."""
        size = self.gpus_per_node
        return [role for role in ROLES if getattr(self, role) > size and getattr(self, role) % size]

    def nodes_of(self, role: str) -> int:
        """Return the number of nodes a role is on; 0 where it has no GPUs of its own."""
        return sum(role in node for node in self.nodes)

    def service_shares(self, services: dict[str, Service]) -> dict[str, int]:
        """Return how many of `teacher`'s GPUs each of these services gets, by its teacher's key.

        As many as it asks for; without `processes` an even part of what the others leave.
        RecipeError where they ask for more or fewer than there are, or nothing is left to share.
        """
        total = self.teacher
        if not services:
            raise RecipeError(
                f"cluster.teacher={total} gives GPUs to a teacher service, but no teacher has one; "
                "add teacher.service, or write cluster.teacher=0."
            )
        asked = {key: service.processes for key, service in services.items() if service.processes}
        silent = [key for key in services if key not in asked]
        left = total - sum(asked.values())
        if not silent and left:
            words = " and ".join(f"{key}.service.processes={n}" for key, n in asked.items())
            differ = "differs" if len(asked) == 1 else f"sum to {total - left}, which differs"
            remedy = f"processes={total}" if len(asked) == 1 else f"cluster.teacher={total - left}"
            raise RecipeError(f"{words} {differ} from cluster.teacher={total}; write {remedy}.")
        if silent and (left < len(silent) or left % len(silent)):
            raise RecipeError(
                f"cluster.teacher={total} leaves {max(0, left)} GPUs for {' and '.join(silent)}, "
                f"which cannot share them evenly; write {silent[0]}.service.processes=N."
            )
        return {key: asked.get(key) or left // len(silent) for key in services}
