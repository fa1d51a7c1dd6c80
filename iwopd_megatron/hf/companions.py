"""What goes with a model's weights: config, generation config, tokenizer, chat templates.

They travel with every checkpoint (its folder `hf`) and into every exported folder, whose weights
are plain whatever the template's were.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Collection
from pathlib import Path
from typing import Any

from iwopd_megatron.errors import RecipeError
from iwopd_megatron.hf.config import read_json
from iwopd_megatron.hf.folder import eos_ids

FOLDER = "hf"  # of a checkpoint
# Files of a model folder that do not go with it: its weights, and what describes them.
NO_COMPANION = (
    ".safetensors",
    ".bin",
    ".pt",
    ".pth",
    ".gguf",
    ".h5",
    ".msgpack",
    ".index.json",
    "manifest.json",
)
SCALING = ("quantization_config", "compression_config")  # of config.json


def copy_companions(template: Path, folder: Path) -> None:
    """Copy all files of a model folder but its weights and hidden ones.

    The copied config.json does not say how weights were scaled: exported ones are plain.
    """
    for file in template.rglob("*"):
        place = file.relative_to(template)
        is_hidden = any(part.startswith(".") for part in place.parts)
        if file.is_file() and not is_hidden and not file.name.endswith(NO_COMPANION):
            (folder / place).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(file, folder / place)
    config = read_json(folder, "config.json")
    if any(key in config for key in SCALING):
        _write_json(folder / "config.json", {k: v for k, v in config.items() if k not in SCALING})


def set_eos_ids(folder: Path, ids: Collection[int]) -> None:
    """Make generation_config.json name the ids that end an answer, if the configs do not yet."""
    if set(ids) == eos_ids(folder):
        return
    file = folder / "generation_config.json"
    content = read_json(folder, file.name) if file.is_file() else {}
    found = sorted(ids)
    _write_json(file, content | {"eos_token_id": found if len(found) > 1 else found[0]})


def write_companions(template: Path, folder: Path, eos_ids: Collection[int]) -> None:
    """Copy a template's companions; `eos_ids`, if any, become the ids that end an answer."""
    copy_companions(template, folder)
    if eos_ids:
        set_eos_ids(folder, eos_ids)


def template_of(checkpoint: Path, given: Path | None) -> Path:
    """Return the folder with a checkpoint's companions: the one given, or its own.

    RecipeError where the checkpoint has none.
    """
    if given is not None:
        return given
    own = checkpoint / FOLDER
    if not (own / "config.json").is_file():
        raise RecipeError(
            f"{checkpoint} carries no config.json and tokenizer ({FOLDER}/), as those of other "
            "programs and earlier versions do not; add --hf FOLDER."
        )
    return own


def _write_json(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n")
