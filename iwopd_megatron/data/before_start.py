"""The data of runs that are about to start: read before there is any process or folder.

config's preflight refuses what a recipe says; this reads the problems that the recipe names.
"""

from __future__ import annotations

from iwopd_megatron.config.recipe import Recipe
from iwopd_megatron.data.run_data import RunData, check_rows, load_all
from iwopd_megatron.runtime.quiet import quiet


def check_before_start(recipes: list[Recipe]) -> list[RunData]:
    """Return the data of runs that are about to start here; RecipeError if one of them cannot."""
    quiet()
    return load_all(recipes)


def check_before_launch(recipe: Recipe) -> list[str]:
    """Refuse a job whose rows are wrong, as far as they lie here; return notes on the others.

    Needs no tokenizer: a login node may have no transformers. The job itself encodes the prompts.
    """
    try:
        unread = check_rows(recipe)
    except ImportError as error:
        return [f"data is checked when the job starts, for {error.name} is not installed here."]
    if not unread:
        return []
    return [f"{', '.join(unread)} of the hub: checked when the job starts."]
