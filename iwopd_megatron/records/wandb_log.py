"""A run's metrics in Weights & Biases, where the recipe asks for it. Only this file imports it.

One W&B run a run folder: its id lies in RUN/wandb_id, so that a resumed run goes on in it. Key and
host come from W&B's own settings (`wandb login`, WANDB_API_KEY), never from a recipe.
"""

from __future__ import annotations

import importlib.util
import secrets

from iwopd_megatron.config.recipe import Recipe, Wandb
from iwopd_megatron.errors import RecipeError


def check_installed(recipe: Recipe) -> None:
    """Refuse a recipe that wants W&B where it is not installed."""
    if recipe.wandb is not None and importlib.util.find_spec("wandb") is None:
        raise RecipeError(
            "the recipe has a wandb section, and wandb is not installed here; "
            "pip install 'iwopd-megatron[wandb]', or remove the section."
        )


class WandbLog:
    """Scalars of every line against its round; later values of a round replace earlier ones."""

    def __init__(self, recipe: Recipe, settings: Wandb):
        """Begin the run folder's W&B run, or go on with it. settings: the recipe's section."""
        import wandb

        file = recipe.out / "wandb_id"
        if not file.is_file():
            file.write_text(secrets.token_hex(4))
        self._run = wandb.init(
            project=settings.project,
            entity=settings.entity,
            group=settings.group,
            name=recipe.out.name,
            mode=settings.mode,
            id=file.read_text().strip(),
            resume="allow",
            dir=str(recipe.out),
            config=recipe.model_dump(mode="json"),
            settings=wandb.Settings(silent=True, console="off"),
        )
        self._run.define_metric("*", step_metric="round_number")

    def write(self, kind: str, round_number: int, values: dict[str, int | float]) -> None:
        """Send the values of a line ("round", "eval") under KIND/NAME."""
        named = {f"{kind}/{key}": value for key, value in values.items()}
        self._run.log({"round_number": round_number} | named)

    def close(self) -> None:
        """End the W&B run; returns when all is sent."""
        self._run.finish()
