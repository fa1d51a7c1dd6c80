"""A folder of iterations as Megatron-LM, Megatron-Bridge and ms-swift keep: which one is loaded."""

from __future__ import annotations

from pathlib import Path

from iwopd_megatron.errors import RecipeError

TRACKER = "latest_checkpointed_iteration.txt"


def iteration_folder(folder: Path) -> Path:
    """Return the iteration that a folder's tracker names; a folder without one, as it is.

    RecipeError if the tracker cannot be followed.
    """
    tracker = folder / TRACKER
    if not tracker.is_file():
        return folder
    text = tracker.read_text(errors="replace").strip()
    if text != "release" and not (text.isascii() and text.isdigit()):
        raise RecipeError(f"{tracker} says '{text[:40]}', neither an iteration nor 'release'.")
    found = folder / (text if text == "release" else f"iter_{int(text):07d}")
    if not found.is_dir():
        raise RecipeError(f"{tracker} names {found.name}, which is not there; name another folder.")
    return found
