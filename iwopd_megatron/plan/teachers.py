"""A recipe's teachers as the planner sees them: size, layout, GPUs, share of the samples.

An embedded teacher scores on the trainer's GPUs, before or after the others there. Every service
has GPUs of its own and scores beside the others as answers end. Servers given by their urls are not
planned.
"""

from __future__ import annotations

from dataclasses import dataclass

from iwopd_megatron.config.models import Layout, Teacher
from iwopd_megatron.config.recipe import Recipe
from iwopd_megatron.data.sources import check_sources, resolve
from iwopd_megatron.plan.model_size import ModelSize


@dataclass(frozen=True)
class PlannedTeacher:
    """A teacher with its layout. `key`: its name in the recipe, 'teacher' or 'teachers.SOURCE'."""

    key: str
    model: Teacher
    size: ModelSize
    layout: Layout
    gpus: int  # its service's or the trainer's; 0 at urls
    tokens: int  # budget of its micro-batches
    share: float  # of a round's samples


def sample_shares(recipe: Recipe) -> dict[str, float]:
    """Return teacher's key -> share of the samples that it scores, in sum 1.

    Equal ones unless `shares_are_given`; {} for fine-tuning, which has no teacher.
    """
    keys, mixed = list(recipe.named_teachers), _mixed_sources(recipe)
    if not mixed:
        return {key: 1 / len(keys) for key in keys}
    check_sources(recipe, (source for source, _ in mixed))
    weights = dict.fromkeys(keys, 0.0)
    for source, share in mixed:
        weights[f"teachers.{source}"] += share
    total = sum(weights.values())
    return {key: weight / total for key, weight in weights.items()}


def shares_are_given(recipe: Recipe) -> bool:
    """Return whether data.train says how many of its problems are each teacher's.

    Rows that name their own source, and sources without a share, are counted only in a run.
    """
    return bool(_mixed_sources(recipe))


def _mixed_sources(recipe: Recipe) -> list[tuple[str, float]]:
    """Return (source, its share) as data.train mixes them; [] where it does not say."""
    sources = [resolve(source) for source in recipe.data.train] if recipe.teachers else []
    named = [(source.source, source.share) for source in sources if source.source]
    is_mixed = all(share for _, share in named) or len({name for name, _ in named}) == 1
    if len(named) < len(sources) or not is_mixed:
        return []
    return [(name, share or 1.0) for name, share in named]
