"""A run is refused before it starts where this machine's memory would not do for its processes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from iwopd_megatron.config.recipe import Recipe
from iwopd_megatron.errors import RecipeError
from iwopd_megatron.plan.hardware import GIB
from iwopd_megatron.plan.host import Needs

LEAST = 0.95  # of what cheaper changes leave: a change that leaves more is not worth naming


def check(recipe: Recipe, there: float, processes: int | None = None) -> None:
    """Refuse a run whose processes on this machine need more than is there, in bytes.

    processes: of its world here; default: all. RecipeError with the GiB of each phase and the first
    knob to turn, unless gates.host_memory is false.
    """
    if not recipe.gates.host_memory:
        return
    needs = Needs(recipe, processes or recipe.world)
    if needs.most <= there:
        return
    phases = ", ".join(f"{name} {size / GIB:.1f}" for name, size in needs.phases.items())
    raise RecipeError(
        f"the run needs {needs.most / GIB:.1f} GiB of this machine's memory and {there / GIB:.1f} "
        f"are there (GiB by phase: {phases}); {_remedy(needs, there)}, or "
        "gates.host_memory=false to start all the same."
    )


def _remedy(needs: Needs, there: float) -> str:
    """Return the first knob with which the run fits, else the one that saves most, else none."""
    best, least = "", needs.most
    for text, changed in _knobs(needs):
        if changed.most <= there:
            return f"write {text}"
        if changed.most < LEAST * least:
            best, least = text, changed.most
    if best:
        return f"begin with {best}, which leaves {least / GIB:.1f}"
    return "take a smaller student.hf or a machine with more memory"


def _knobs(needs: Needs) -> Iterator[tuple[str, Needs]]:
    """Yield (key=value, the needs with it), the cheapest change first."""
    recipe = needs.recipe
    longest = recipe.rollout.max_prompt_tokens + recipe.rollout.max_response_tokens
    if needs.rows > 1:
        rows = -(-needs.rows // 4)
        yield f"rollout.batch_size={rows}", _with(needs, "rollout", batch_size=rows)
    if recipe.train.microbatch_tokens > longest:
        changed = _with(needs, "train", microbatch_tokens=longest)
        yield f"train.microbatch_tokens={longest}", changed
    if recipe.student.recompute != "full":
        yield "student.recompute=full", _with(needs, "student", recompute="full")
    fewest = recipe.student.parallel.unit
    if needs.processes == recipe.world > fewest:
        fewer = replace(needs, recipe=recipe.model_copy(update={"processes": fewest}))
        yield f"processes={fewest}", replace(fewer, processes=fewest)


def _with(needs: Needs, section: str, **values: Any) -> Needs:
    changed = getattr(needs.recipe, section).model_copy(update=values)
    return replace(needs, recipe=needs.recipe.model_copy(update={section: changed}))
