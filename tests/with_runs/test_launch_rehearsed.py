"""What a launch on GPUs rehearses before anything is submitted."""

import sys
from pathlib import Path

import pytest

from iwopd_megatron.config.load import read_recipe
from iwopd_megatron.errors import RecipeError
from iwopd_megatron.launch.profile import Profile
from iwopd_megatron.launch.rehearsed import rehearse

ROOT = Path(__file__).parents[2]


def test_a_launch_on_gpus_is_rehearsed_first(capfd, monkeypatch):
    """What would not fit is found before anything is submitted; what is well goes on."""
    monkeypatch.chdir(ROOT)
    site = Profile.model_validate(
        {"executor": "slurm", "gpu": "h100-80", "gpus_per_node": 8, "slurm": {"account": "a"}}
        | {"python": sys.executable}
    )
    well = Path("recipes/demo_tiny_moe.yaml")
    rehearse(well, [], read_recipe(well, []), site)
    assert "nothing found" in capfd.readouterr().out
    recipe, large = Path("recipes/qwen3_4b_to_0p6b.yaml"), ["train.microbatch_tokens=200000"]
    with pytest.raises(RecipeError, match="nothing was submitted.*--no-rehearsal"):
        rehearse(recipe, large, read_recipe(recipe, large), site)
    assert "finding: trainer rank 0 takes" in capfd.readouterr().out
