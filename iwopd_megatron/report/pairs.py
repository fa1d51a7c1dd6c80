"""Gain against compression ratio, over comparisons of several pairs of models (Fig. 2b)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from iwopd_megatron.errors import UserError
from iwopd_megatron.hf.known_models import planning_config
from iwopd_megatron.plan.model_size import ModelSize
from iwopd_megatron.report.data import REFERENCE, find_runs, read_recipe_of
from iwopd_megatron.report.statistics import ENOUGH_SEEDS
from iwopd_megatron.report.summary import summarise


class PairGain(NamedTuple):
    """Final accuracy of one arm of one comparison minus OPD's, in points."""

    ratio: float  # parameters of the teacher over those of the student
    gain: float
    interval: list[float] | None  # 95 %, over seeds; None for too few of them


def compression_ratio(run: Path) -> float | None:
    """Return parameters of the teacher over those of the student.

    None where a run's recipe names a model whose size cannot be known here.
    """
    recipe = read_recipe_of(run)
    try:
        teacher, student = (
            ModelSize.of(planning_config(Path(recipe[role]["hf"]))).parameters
            for role in ("teacher", "student")
        )
    except (KeyError, TypeError, UserError):
        return None
    return teacher / student


def pair_gains(folders: Sequence[Path]) -> dict[str, list[PairGain]]:
    """Return arm -> a point for each comparison that has OPD too; {} unless the ratios differ."""
    found: dict[str, list[PairGain]] = {}
    for folder in folders:
        paths = find_runs([folder])
        ratio = compression_ratio(next(iter(paths.values()))[0])
        if ratio is None:
            continue
        for arm, pair in summarise(paths)["paired"].items():
            if pair["final"] is not None and pair["reference"] == REFERENCE:
                is_enough = len(pair["final_per_seed"]) >= ENOUGH_SEEDS
                interval = [100 * bound for bound in pair["final_interval"]] if is_enough else None
                found.setdefault(arm, []).append(PairGain(ratio, 100 * pair["final"], interval))
    ratios = {round(point.ratio, 3) for points in found.values() for point in points}
    return found if len(ratios) > 1 else {}
