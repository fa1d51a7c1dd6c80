"""All teachers of a recipe as one: embedded or behind HTTP, one for all problems or a source."""

from __future__ import annotations

import os
from typing import Any

from iwopd_megatron.batch.packing import Packer
from iwopd_megatron.batch.scores import Support
from iwopd_megatron.batch.trajectory import Trajectory
from iwopd_megatron.config.models import Teacher
from iwopd_megatron.config.recipe import Recipe
from iwopd_megatron.runtime.background import Background
from iwopd_megatron.runtime.main_only import main_only
from iwopd_megatron.teacher.connection import TeacherConnection
from iwopd_megatron.teacher.embedded import EmbeddedScorer
from iwopd_megatron.teacher.remote import RemoteScorer, TeacherConnections
from iwopd_megatron.teacher.scorer import Scorer


class Teachers:
    """A `Scorer` that has each sample scored by the teacher of its source."""

    def __init__(self, recipe: Recipe, packer: Packer, tokenizer: Any):
        """Return when all are loaded or answer, and hold the right models. Collective.

        packer: the student's; tokenizer: the student's.
        """
        teachers = recipe.named_teachers
        remote = {role: teacher for role, teacher in teachers.items() if teacher.is_remote}
        self.remote: RemoteScorer | None = None
        if remote:
            connections = main_only(
                packer.parallel, lambda: _connections(recipe, remote, tokenizer)
            )
            self.remote = RemoteScorer(connections, packer)
        # While services load, so do embedded models.
        self.embedded = {
            _source(role): EmbeddedScorer(teacher, packer, recipe.rollout.temperature)
            for role, teacher in teachers.items()
            if not teacher.is_remote
        }
        self.by_source: dict[str, Scorer] = dict(self.embedded)
        if self.remote is not None:
            self.remote.connect()
            self.by_source |= dict.fromkeys(map(_source, remote), self.remote)

    def begin(self, sample: Trajectory, topk: int = 0) -> None:
        """Start scoring one sample if its teacher is remote, which `score_samples` awaits.

        Does nothing but on rank 0.
        """
        if self.remote is not None and self._of(sample) is self.remote:
            self.remote.begin(sample, topk)

    def scored_early(self, samples: list[Trajectory], topk: int = 0) -> float | None:
        """Return the share of these that remote teachers have scored already. Rank 0 only.

        None: all teachers of these are embedded.
        """
        away = [sample for sample in samples if self._of(sample) is self.remote]
        if self.remote is None or not away:
            return None
        return self.remote.count_scored(away, topk) / len(away)

    def score_samples(
        self, samples: list[Trajectory], topk: int = 0
    ) -> tuple[list[list[float]], list[Support]]:
        """As the protocol says. With `topk` one embedded teacher, or remote ones only."""
        scorers = list(dict.fromkeys(self.by_source.values()))
        if len(scorers) == 1:
            return scorers[0].score_samples(samples, topk)
        values: dict[int, list[float]] = {}
        for sample in samples:
            self.begin(sample)  # scored elsewhere while the embedded ones work
        for scorer in scorers:  # the remote one is the last
            own = [sample for sample in samples if self._of(sample) is scorer]
            if own:
                scores, _ = scorer.score_samples(own)
                values |= zip((sample.index for sample in own), scores, strict=True)
        return [values[sample.index] for sample in samples], []

    def _of(self, sample: Trajectory) -> Scorer:
        return self.by_source[sample.source if sample.source in self.by_source else ""]

    def close(self) -> None:
        """Stop the services that the run started."""
        if self.remote is not None:
            self.remote.close()


def _source(role: str) -> str:
    """Return the source of problems that a teacher's key in the recipe names; '' for all."""
    return role.partition(".")[2]


def _connections(
    recipe: Recipe, teachers: dict[str, Teacher], tokenizer: Any
) -> TeacherConnections:
    """Return rank 0's connections to remote teachers, by role; start the services among them."""
    background, by_source = Background("teachers"), {}
    gpu = int(os.environ["LOCAL_WORLD_SIZE"])  # the first one that trainers leave free
    for role, teacher in teachers.items():
        by_source[_source(role)] = TeacherConnection(
            recipe, role, teacher, tokenizer, background, gpu
        )
        gpu += teacher.service.world if teacher.service is not None and not teacher.urls else 0
    return TeacherConnections(background, by_source)
