"""A rehearsal before a submission: what would be wrong on the cluster's GPUs is told here."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from iwopd_megatron.config.recipe import Recipe
from iwopd_megatron.errors import RecipeError
from iwopd_megatron.launch.profile import Profile

SKIP = "--no-rehearsal"


def rehearse(file: Path, overrides: list[str], recipe: Recipe, profile: Profile) -> None:
    """Rehearse a recipe for a profile's GPUs in its short form; RecipeError if anything is found.

    By the profile's Python or this one, whichever can import torch and Megatron-Core; a note where
    neither can, as where launching has an environment of its own.
    """
    python = next((x for x in (profile.python, sys.executable) if _can(x)), None)
    if python is None:
        print(
            "note: no Python here has torch and Megatron-Core, so the launch is not rehearsed; "
            f"run iwopd rehearse {file} --full where one has."
        )
        return
    command = [python, "-W", "ignore", "-m", "iwopd_megatron", "rehearse", str(file), *overrides]
    if recipe.cluster is not None:
        command.append(f"cluster.gpu={profile.gpu}")
    print("rehearsing at full size, two and three layers in the place of all:", flush=True)
    code = subprocess.run([*command, "--full", "--short"]).returncode
    if code:
        raise RecipeError(
            f"the rehearsal of {file} ended with {code}, and nothing was submitted; mend what it "
            f"says, or launch with {SKIP}."
        )


def _can(python: str) -> bool:
    """Return whether a Python has what a rehearsal needs."""
    try:
        needed = "import megatron.core, torch, iwopd_megatron"
        return subprocess.run([python, "-c", needed], capture_output=True).returncode == 0
    except OSError:
        return False
