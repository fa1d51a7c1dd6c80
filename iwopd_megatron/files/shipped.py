"""Files that come with the package: recipes, the demo's models and data, cluster profiles.

In a checkout they are folders of its root, where people read them. A wheel has copies of the same
folders inside the package, which setup.py puts there.
"""

from __future__ import annotations

import difflib
from pathlib import Path

PACKAGE = Path(__file__).parents[1]
INSIDE = PACKAGE / "shipped"  # of a wheel
ROOT = INSIDE if INSIDE.is_dir() else PACKAGE.parent
RECIPES = ROOT / "recipes"
PROFILES = ROOT / "cluster" / "profiles"
SUFFIXES = ("", ".yaml", ".yml")


def here_or_shipped(path: Path) -> Path:
    """Return `path`, or the shipped file of the same relative path where this folder has none."""
    shipped = ROOT / path  # an absolute path is itself
    return shipped if not _is_here(path) and _is_here(shipped) else path


def find_recipe(path: Path) -> Path:
    """Return the recipe file that is meant by a path, or by a bare name such as demo_tiny_moe.

    A file in the current folder goes before the shipped recipe of that name. A path that names
    neither is returned as it is.
    """
    if not is_bare(path):
        return here_or_shipped(path)
    names = [path.name] if path.suffix else [path.name, f"{path.name}.yaml"]
    for file in [*map(Path, names), *(RECIPES / name for name in names)]:
        if _is_file(file):
            return file
    return path


def is_bare(path: Path) -> bool:
    """Return whether a path is a recipe's name alone, with or without .yaml."""
    return str(path) == path.name and path.suffix in SUFFIXES


def nearest_recipes(name: str, most: int = 3) -> list[str]:
    """Return the names of shipped recipes that are most like `name`, best first."""
    names = sorted(file.stem for file in RECIPES.glob("*.yaml"))
    return difflib.get_close_matches(name, names, n=most, cutoff=0.0)


def _is_here(path: Path) -> bool:
    """Return whether there is anything; a name that no file system has is not there."""
    try:
        return path.exists()
    except OSError:
        return False


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:
        return False
