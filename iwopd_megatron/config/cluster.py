"""The recipe's cluster section: which GPUs a recipe was laid out for, and how roles share them.

Names no site: account, partition, container and mounts are the launch's cluster profile.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from iwopd_megatron.config.models import NonNegativeInt, PositiveInt, Section

ROLES = ("trainer", "teacher", "rollout")


class Cluster(Section):
    """GPUs of each role: whole nodes, or a part of a node that other roles may share."""

    gpu: Literal["h100-80", "h200", "b200", "h20", "a100"] = "h100-80"
    gpus_per_node: PositiveInt = 8
    trainer: PositiveInt = Field(description="GPUs of the trainer's world")
    teacher: NonNegativeInt = Field(0, description="GPUs of the teacher service; 0: embedded")
    rollout: NonNegativeInt = Field(0, description="GPUs of the rollout servers; 0: embedded")

    @property
    def gpus(self) -> int:
        return self.trainer + self.teacher + self.rollout

    @property
    def nodes(self) -> list[dict[str, int]]:
        """GPUs of each role on every node: whole nodes first, parts of nodes packed together."""
        whole, shared = [], []
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
        """Nodes a role is on; 0 where it has no GPUs of its own."""
        return sum(role in node for node in self.nodes)
