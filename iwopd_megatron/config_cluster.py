"""The recipe's cluster section: which GPUs a recipe was laid out for, and how roles share them.

Names no site: account, partition, container and mounts are the launch's cluster profile.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, NonNegativeInt, PositiveInt

from iwopd_megatron.config_models import Section

ROLES = ("trainer", "teacher", "rollout")


class Cluster(Section):
    gpu: Literal["h100-80", "h200", "b200", "h20", "a100"] = "h100-80"
    gpus_per_node: PositiveInt = 8
    trainer: PositiveInt = Field(description="GPUs of the trainer's world")
    teacher: NonNegativeInt = Field(0, description="GPUs of the teacher service; 0: embedded")
    rollout: NonNegativeInt = Field(0, description="GPUs of the rollout servers; 0: embedded")

    @property
    def gpus(self) -> int:
        return self.trainer + self.teacher + self.rollout

    @property
    def is_one_node(self) -> bool:
        """All roles share one node; otherwise each role has whole nodes of its own."""
        return self.gpus <= self.gpus_per_node

    def nodes(self, role: str) -> int:
        """Whole nodes of a role; 0 where it has no GPUs of its own."""
        return -(-getattr(self, role) // self.gpus_per_node)
