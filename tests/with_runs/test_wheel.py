"""The wheel, installed without the checkout: its commands run in an empty folder.

Dependencies come from this environment; the package itself from the wheel alone.
"""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md")
FOLDERS = ("iwopd_megatron", "recipes", "cluster")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from a copy, for a build leaves files beside its sources."""
    copy = tmp_path_factory.mktemp("source")
    for name in FILES:
        shutil.copy(ROOT / name, copy / name)
    for name in FOLDERS:
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, copy / name, ignore=ignored)
    out = tmp_path_factory.mktemp("dist")
    subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "wheel",
            "--no-build-isolation",
            "--no-deps",
            "--no-index",
            "--quiet",
            "--disable-pip-version-check",
            str(copy),
            "--wheel-dir",
            str(out),
        ],
        check=True,
    )
    (file,) = out.glob("*.whl")
    return file


@pytest.fixture(scope="module")
def commands(wheel, tmp_path_factory) -> Path:
    """The bin/ of a fresh environment that has the wheel, and this one's dependencies."""
    place = tmp_path_factory.mktemp("venv")
    subprocess.run([sys.executable, "-m", "venv", str(place)], check=True)
    own = Path(sysconfig.get_path("purelib", vars={"base": str(place)}))
    subprocess.run(
        [
            place / "bin/python",
            "-m",
            "pip",
            "install",
            "--no-deps",
            "--no-index",
            "--quiet",
            "--disable-pip-version-check",
            str(wheel),
        ],
        check=True,
    )
    (own / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return place / "bin"


@pytest.fixture
def run(commands, tmp_path, monkeypatch):
    """Run a program of that environment in an empty folder; its output."""
    monkeypatch.chdir(tmp_path)
    env = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    env["PYTHONWARNINGS"] = "ignore"

    def start(program, *words, code=0, folder="."):
        command = [commands / program, *map(str, words)]
        done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=folder)
        assert done.returncode == code, done.stderr
        return done.stdout + done.stderr

    return start


def test_the_wheel_has_what_the_repository_has(wheel):
    shipped = "iwopd_megatron/shipped/"
    inside = {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith(shipped)}
    folders = (ROOT / "recipes", ROOT / "cluster/profiles")
    files = [file for folder in folders for file in folder.rglob("*") if file.is_file()]
    assert inside == {shipped + str(file.relative_to(ROOT)) for file in files}


def test_the_package_is_the_wheels(run, commands):
    code = "import iwopd_megatron, sys; print(iwopd_megatron.__file__, *sys.path, sep='\\n')"
    place, *path = run("python", "-c", code).split("\n")
    assert Path(place).is_relative_to(commands.parent)
    assert str(ROOT) not in path


def test_every_file_of_the_package_imports(run):
    code = (
        "import importlib, pkgutil, iwopd_megatron as package\n"
        "names = [m.name for m in pkgutil.walk_packages(package.__path__, 'iwopd_megatron.')]\n"
        "for name in names:\n"
        "    if 'sandbox' not in name and not name.endswith(('nemo', 'vllm_worker', '__main__')):\n"
        "        importlib.import_module(name)\n"
        "print(f'{len(names)} modules')"
    )
    found = re.search(r"(\d+) modules", run("python", "-c", code))
    assert found and int(found[1]) > 150


def test_it_explains_plans_and_names_its_recipes(run):
    assert "Plan and launch" in run("iwopd", "--help")
    assert "verdict" in run("iwopd", "plan", "qwen3_235b_a22b_to_30b_a3b")
    assert "nearest names are demo_tiny_moe" in run("iwopd", "plan", "demo_tiny_mo", code=2)
    assert "2048 prompts" in run("iwopd", "data", "demo_tiny_moe")
    said = run("iwopd", "launch", "demo_tiny_moe", "--cluster", "nowhere", code=2)
    assert "one of: docker, laptop, local" in said


def test_its_demo_trains(run, tmp_path):
    run("iwopd", "init", "first", "--demo")
    run("iwopd", "train", "recipe.yaml", "train.rounds=2", folder="first")
    assert (tmp_path / "first/runs/first/hf/config.json").is_file()
    assert "is not empty" in run("iwopd", "init", "first", "--demo", code=2)
    run("iwopd", "train", "demo_tiny_moe", "train.rounds=1", "train.warmup_rounds=0", "out=named")
    assert (tmp_path / "named/hf/config.json").is_file()
