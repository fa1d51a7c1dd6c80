"""What is said to be supported is what was run, and what is not is refused."""

import json
import sys
from pathlib import Path

import pytest
from packaging.version import Version

from iwopd_megatron.cli import main as cli
from iwopd_megatron.errors import RecipeError
from iwopd_megatron.runtime import versions
from iwopd_megatron.runtime.versions import Support

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "bench"))
import support  # noqa: E402

RUNS = [
    {"suite": "tests", "machine": "CPU", "versions": {"torch": "2.13.0"}, "passed": 9, "failed": 0},
    {"suite": "tests", "machine": "CPU", "versions": {"torch": "2.9.1"}, "passed": 9, "failed": 0},
    {"suite": "core", "machine": "CPU", "versions": {"torch": "2.14.1"}, "passed": 7, "failed": 2},
]


def test_the_tables_are_those_of_the_recorded_runs():
    for page, text in support.pages(versions.tested_runs()).items():
        assert page.read_text() == text, f"{page}: make support"


def test_the_pinned_versions_were_tested():
    pinned = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line]
    tested = {s.distribution: s.tested for s in versions.all_support()}
    for line in pinned:
        name, version = line.split(";")[0].strip().split("==")
        if name in tested:
            assert version in tested[name], line


def test_a_version_is_tested_broken_expected_or_refused(monkeypatch):
    torch = Support.of("torch", RUNS)
    assert torch.tested == ["2.9.1", "2.13.0"] and torch.broken == ["2.14.1"]
    monkeypatch.setattr(versions, "required", lambda name: versions.SpecifierSet(">=2.6,<3"))
    said = {v: torch.status(v) for v in ("2.13.0", "2.14.1", "2.12.0", "3.0", None)}
    assert list(said.values()) == [
        "tested", "tests failed", "expected to work", "refused", "not installed"
    ]  # fmt: skip


def test_a_refused_version_is_one_sentence(monkeypatch):
    versions.require("megatron-core")
    monkeypatch.setattr(versions, "installed", lambda name: "0.15.3")
    with pytest.raises(RecipeError, match=r"^Megatron-Core 0\.15\.3 is installed, .*>=0\.16\.1"):
        versions.require("megatron-core")


def test_parts_of_a_run_count_together_and_replace_the_run_before():
    again = [RUNS[2] | {"passed": 5, "failed": 0}, RUNS[2] | {"passed": 4, "failed": 0}]
    merged = support.merge(RUNS, again)
    assert len(merged) == 3
    assert [run["passed"] for run in merged if run["suite"] == "core"] == [9]
    assert not any(run["failed"] for run in merged)


def test_this_environment_is_recorded():
    run = versions.recorded(3, 0, "tests", {"sglang": "0.5.23"})
    assert run["versions"]["sglang"] == "0.5.23" and run["passed"] == 3
    assert run["versions"]["megatron-core"] == versions.installed("megatron-core")
    assert json.loads(json.dumps(run)) == run
    assert Version(run["versions"]["torch"]).local is None


def test_doctor_without_a_recipe_tells_this_machines_versions(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["iwopd", "doctor"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert not ended.value.code
    out = capsys.readouterr().out
    for name in versions.NAMES.values():
        assert name in out
    assert versions.installed("megatron-core") in out
