"""A recipe's teachers as the planner sees them: size, layout, GPUs, and the samples each scores.

An embedded teacher scores on the trainer's GPUs, before or after the others there. Every service
has GPUs of its own and scores beside the others as answers end. Servers given by their urls are not
planned.
"""

from __future__ import annotations

from dataclasses import dataclass

from iwopd_megatron.config.models import Layout, Teacher
from iwopd_megatron.config.recipe import Recipe
from iwopd_megatron.data.sources import check_sources, resolve
from iwopd_megatron.plan.model import ModelSize


@dataclass(frozen=True)
class Scorer:
    """One teacher. `key`: its name in the recipe, 'teacher' or 'teachers.SOURCE'."""

    key: str
    model: Teacher
    size: ModelSize
    layout: Layout
    gpus: int  # its service's or the trainer's; 0 at urls
    tokens: int  # budget of its micro-batches
    share: float  # of a round's samples


def sample_shares(recipe: Recipe) -> dict[str, float]:
    """Share of the samples that each teacher scores; equal ones unless `shares_are_given`.

    {} for fine-tuning, which has no teacher.
    """
    keys = list(recipe.named_teachers)
    if not shares_are_given(recipe):
        return {key: 1 / len(keys) for key in keys}
    sources = [resolve(source) for source in recipe.data.train]
    check_sources(recipe, (source.source for source in sources))
    weights = dict.fromkeys(keys, 0.0)
    for source in sources:
        weights[f"teachers.{source.source}"] += source.share or 1.0
    total = sum(weights.values())
    return {key: weight / total for key, weight in weights.items()}


def shares_are_given(recipe: Recipe) -> bool:
    """Whether data.train says how many of its problems are each teacher's.

    Rows that name their own source, and sources without a share, are counted only in a run.
    """
    sources = [resolve(source) for source in recipe.data.train] if recipe.teachers else []
    is_known = all(source.source for source in sources)
    is_mixed = all(source.share for source in sources) or len({s.source for s in sources}) == 1
    return bool(sources) and is_known and is_mixed
