"""The documentation says what is there: commands, options, keys, files, and examples that run."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from iwopd_megatron.config.load import parse_recipe
from iwopd_megatron.config.recipe import Recipe
from iwopd_megatron.launch.profile import Profile

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "docs" / "hooks"))
import commands
import offline
import recipe_keys

PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")])
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
FENCE = re.compile(r"^(<!-- test -->\n)?```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
KEYS = set(recipe_keys.keys(Recipe))


def blocks(page: Path, language: str) -> list[str]:
    return [text for _, kind, text in FENCE.findall(page.read_text()) if kind == language]


def examples() -> list[tuple[str, str]]:
    """Python blocks that are marked as tests, by page."""
    return [
        (name, text)
        for name, page in zip(NAMES, PAGES, strict=True)
        for mark, kind, text in FENCE.findall(page.read_text())
        if mark and kind == "python"
    ]


def command_lines(page: Path) -> list[str]:
    """Everything that starts with iwopd, in blocks for a shell and in `code`."""
    text = page.read_text()
    lines = [line for block in blocks(page, "bash") for line in block.splitlines()]
    lines += re.findall(r"`(iwopd [^`]*)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
    found = [part for line in lines for part in re.split(r"\s#|;", line)]
    return [m[0] for line in found if (m := re.search(r"\biwopd [a-z].*", line.replace("\n", " ")))]


def is_key(key: str) -> bool:
    """Whether a dotted name is a recipe's key; names of mappings are the user's."""
    plain = re.sub(r"^(teachers|data\.benchmarks)\.[^.]+", r"\1.NAME", key)
    return plain in KEYS


@pytest.mark.parametrize("name, text", examples())
def test_an_example_runs(name, text):
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", text], capture_output=True)
    assert done.returncode == 0, done.stderr.decode()


def test_there_are_examples():
    assert len(examples()) >= 3


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_commands_and_options_are_there(page):
    known = commands.all_commands()
    for line in command_lines(page):
        words = line.split()[1:]
        name = next((n for n in (" ".join(words[:2]), words[0]) if n in known), None)
        assert name is not None or words[0] in {n.split()[0] for n in known}, line
        wrong = [
            word
            for word in words
            if word.startswith("--")
            and name
            and word.partition("=")[0] not in [*commands.options(known[name]), "--help"]
        ]
        assert not wrong, f"{line}: no such option {wrong}"


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_settings_are_recipe_keys(page):
    text = page.read_text()
    sections = {key for key in KEYS if "." not in key}
    for key in re.findall(r"(?<![\w./-])([a-z_]+(?:\.[a-z_]+)+)(?==|: |`)", text):
        if key.split(".")[0] in sections and not key.endswith((".yaml", ".py", ".json", ".md")):
            assert is_key(key), f"{page.name}: {key} is no recipe key"


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_yaml_is_of_a_recipe_or_a_profile(page):
    for text in blocks(page, "yaml"):
        tree = yaml.safe_load(text)
        if "executor" in tree:
            Profile.model_validate(tree)
            continue
        whole = {"out": "runs/x", "student": {"hf": "a"}, "data": {"train": "b"}} | tree
        parse_recipe(whole, page.name)


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_files_that_are_named_exist(page):
    text = page.read_text()
    for path in re.findall(
        r"`((?:iwopd_megatron|recipes|cluster|tests|bench|conversion)/[\w./-]+)`", text
    ):
        if page.name != "CONTRIBUTING.md":  # whose examples add files
            assert (ROOT / path).exists(), f"{page.name}: {path}"
    for target in re.findall(r"\]\(([^)#\s]+\.\w+)(?:#[^)]*)?\)", text):
        made = ("reference/", "results.md", "architecture.md", "contributing.md", "figures/")
        if (
            page.parent.name == "hooks"
            or target.startswith("http")
            or any(m in target for m in made)
        ):
            continue  # of pages that the build makes and checks
        assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_the_reference_has_every_key_and_command():
    page = recipe_keys.page(Recipe)
    assert all(f"| `{key}` |" in page for key in KEYS if ".NAME." not in key and "[...]" not in key)
    assert "| `student.parallel.tp` | integer, > 0, < 2^31 | `1` | tensor-parallel size |" in page
    assert "| `student.hf` | path | **required** |" in page
    made = commands.page()
    assert all(f"### `iwopd {name}`" in made for name in commands.all_commands())
    assert "| `--tp` | integer, ≥ 1, ≤ 1048576 | `1` |" in made


def test_every_key_says_what_it_means():
    for root in (Recipe, Profile):
        rows = [row for row in recipe_keys.page(root).splitlines() if row.startswith("| `")]
        assert rows
        assert [row for row in rows if not row.split("|")[-2].strip()] == []


def test_how_tos_are_short():
    for page in (ROOT / "docs" / "howto").glob("*.md"):
        assert len(page.read_text().splitlines()) <= 60, page
    assert len((ROOT / "README.md").read_text().splitlines()) <= 135


@pytest.mark.parametrize(
    "name, text, found",
    [
        ("a.html", '<script src="https://cdn.example.org/x.js"></script>', 1),
        ("a.html", '<link rel="stylesheet" href="//cdn.example.org/x.css">', 1),
        ("a.html", '<link rel="preconnect" href="https://fonts.example.org">', 1),
        ("a.html", '<img src="http://example.org/x.png"><a href="https://example.org">x</a>', 1),
        ("a.html", "<style>p { background: url(https://example.org/x.png) }</style>", 1),
        ("a.html", '<pre class="mermaid">graph</pre>', 1),
        ("a.css", '@import "https://example.org/x.css";', 1),
        ("a.html", '<link rel="canonical" href="https://example.org/"><script src="x.js">', 0),
        ("a.css", "p { background: url(data:image/png;base64,AA) }", 0),
    ],
)
def test_what_a_page_would_fetch_is_found(tmp_path, name, text, found):
    (tmp_path / name).write_text(text)
    assert len(offline.fetched(tmp_path)) == found
