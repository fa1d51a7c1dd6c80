"""`iwopd init`: a folder to start from, with a recipe that explains itself and data for it."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from string import Template

from iwopd_megatron.errors import RecipeError
from iwopd_megatron.files.outputs import check_folder
from iwopd_megatron.files.shipped import RECIPES

TEMPLATE = Path(__file__).with_name("starter.yaml")
RECIPE = "recipe.yaml"
EXAMPLES = """\
{"question": "What is 17 * 23?", "answer": "391", "difficulty": 1, "source": "math"}
{"question": "How many primes are below 20?", "answer": "8", "difficulty": 2, "source": "math"}
"""
OWN = {
    "student": "models/Qwen3-0.6B",
    "teacher": "models/Qwen3-4B-Instruct-2507",
    "train": "train.jsonl",
    "eval": "# eval: eval.jsonl",
    "dtype": "bf16",
    "parallel": "{}",
    "prompt_tokens": "2048",
    "response_tokens": "4096",
    "batch": "64",
    "rounds": "100",
    "prompts": "256",
    "lr": "1.0e-5",
    "warmup": "0",
    "evaluate_every": "10",
    "checkpoint_every": "50",
}
DEMO = OWN | {
    "student": "demo/student",
    "teacher": "demo/teacher",
    "train": "demo/train.jsonl",
    "eval": "eval: demo/eval.jsonl",
    "dtype": "fp32",
    "parallel": "{tp: 2, ep: 2}",
    "prompt_tokens": "16",
    "response_tokens": "43",
    "rounds": "30",
    "prompts": "64",
    "lr": "6.0e-4",
    "warmup": "1",
    "evaluate_every": "5",
    "checkpoint_every": "null",
}


def write_starter(
    folder: Path, student: Path | None = None, teacher: Path | None = None, data: Path | None = None
) -> list[Path]:
    """Write a recipe for these models and data into a new or empty folder; return what was written.

    Paths that lead somewhere from the current folder are written absolute, for the recipe is used
    in its own. Without data two rows are written as an example. RecipeError if there are files.
    """
    _check_empty(folder)
    given = {"student": student, "teacher": teacher, "train": data}
    values = {key: _lasting(path) for key, path in given.items() if path is not None}
    written = [_write(folder / RECIPE, _recipe(OWN | values))]
    if data is None:
        written.append(_write(folder / OWN["train"], EXAMPLES))
    return written


def write_demo(folder: Path) -> list[Path]:
    """Write the demo's recipe, models and data into a new or empty folder; return what was written.

    RecipeError if there are files.
    """
    _check_empty(folder)
    recipe = _write(folder / RECIPE, _recipe(DEMO))
    shutil.copytree(RECIPES / "demo", folder / "demo")
    return [recipe, folder / "demo"]


def _check_empty(folder: Path) -> None:
    check_folder(folder, "DIR")
    if folder.is_dir() and any(folder.iterdir()):
        raise RecipeError(f"{folder} is not empty; name a new folder, or an empty one.")


def _lasting(path: Path) -> str:
    return os.path.abspath(path) if path.exists() else str(path)


def _recipe(values: dict[str, str]) -> str:
    return Template(TEMPLATE.read_text("utf-8")).substitute(values)


def _write(file: Path, text: str) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text, "utf-8")
    return file
