"""All teachers of a recipe as one: embedded or remote, one for all problems or one a source."""

from __future__ import annotations

import os
from typing import Any

from iwopd_megatron.batch.packing import Packer
from iwopd_megatron.batch.scores import Support
from iwopd_megatron.batch.trajectory import Trajectory
from iwopd_megatron.config.recipe import Recipe
from iwopd_megatron.runtime.background import Background
from iwopd_megatron.teacher.embedded import EmbeddedScorer
from iwopd_megatron.teacher.remote import Line, RemoteScorer


class Teachers:
    """Scores each sample by the teacher of its source. Collective but for `begin` and `close`."""

    def __init__(self, recipe: Recipe, packer: Packer, tokenizer: Any):
        """Returns when all are loaded or answer, and hold the right models."""
        self.background: Background | None = None
        named = {role.partition(".")[2]: role for role in recipe.named_teachers}
        models = {source: recipe.named_teachers[role] for source, role in named.items()}
        remote = {source: model for source, model in models.items() if model.is_remote}
        self.remote: RemoteScorer | None = None
        if remote:
            lines = None
            if packer.parallel.is_main:
                self.background, lines = Background("teachers"), {}
                gpu = int(os.environ["LOCAL_WORLD_SIZE"])
                for source, model in remote.items():
                    role = named[source]
                    lines[source] = Line(recipe, role, model, tokenizer, self.background, gpu)
                    gpu += model.service.world if not model.urls else 0
            self.remote = RemoteScorer(lines, packer)
        # While services load, so do embedded models.
        self.embedded = {
            source: EmbeddedScorer(model, packer, recipe.rollout.temperature)
            for source, model in models.items()
            if not model.is_remote
        }
        if self.remote is not None:
            self.remote.connect()

    def begin(self, sample: Trajectory, topk: int = 0) -> None:
        """Start scoring one sample if its teacher is remote; `score` awaits it. Rank 0 only."""
        if self._embedded(sample) is None:
            self.remote.begin(sample, topk)

    def scored_early(self, samples: list[Trajectory], topk: int = 0) -> float | None:
        """Share of these that remote teachers have scored already; None: all teachers are embedded.

        Rank 0 only.
        """
        away = [sample for sample in samples if self._embedded(sample) is None]
        return self.remote.scored_early(away, topk) / len(away) if away else None

    def score(
        self, samples: list[Trajectory], topk: int = 0
    ) -> tuple[list[list[float]], list[Support]]:
        """As `Schedule.score`. With `topk` one embedded teacher, or remote ones only."""
        if self.remote is None and len(self.embedded) == 1:
            return next(iter(self.embedded.values())).score(samples, topk)
        if not self.embedded:
            return self.remote.score(samples, topk)
        values: dict[int, list[float]] = {}
        away = [sample for sample in samples if self._embedded(sample) is None]
        if away and self.remote.lines is not None:
            for sample in away:  # scored while the embedded ones work
                self.remote.begin(sample)
        for scorer in [*self.embedded.values(), self.remote]:
            own = [s for s in samples if (self._embedded(s) or self.remote) is scorer]
            if own:
                scores, _ = scorer.score(own)
                values |= zip((s.index for s in own), scores, strict=True)
        return [values[sample.index] for sample in samples], []

    def _embedded(self, sample: Trajectory) -> EmbeddedScorer | None:
        return self.embedded.get(sample.source, self.embedded.get(""))

    def close(self) -> None:
        """Stop the services that the run started."""
        if self.background is not None:
            self.remote.close()
            self.background.close()
