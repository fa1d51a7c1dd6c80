"""What can be refused of rollout engines before any process starts. Imports no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from iwopd_megatron.errors import RecipeError
from iwopd_megatron.preflight import num_experts, read_hf_config

if TYPE_CHECKING:
    from iwopd_megatron.config import Recipe


def check_rollout(recipe: Recipe) -> None:
    """Refuse to replay experts that nobody chooses or nobody tells."""
    if not recipe.rollout.routing_replay:
        return
    if not num_experts(read_hf_config(recipe.student.hf)):
        raise RecipeError(
            f"rollout.routing_replay needs a student with experts, and {recipe.student.hf} is "
            "dense; write rollout.routing_replay=false."
        )
    if recipe.rollout.engine != "sglang":
        raise RecipeError(
            "rollout.routing_replay needs an engine that returns the experts it chose, and "
            f"{recipe.rollout.engine} does not; write rollout.engine=sglang, or "
            "rollout.routing_replay=false."
        )
