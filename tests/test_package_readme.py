"""The package's README: rooms and doors as they are, and walks whose every step is in the code."""

import ast
import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "iwopd_megatron"
TEXT = (PACKAGE / "README.md").read_text()
ROWS = dict(re.findall(r"^\| `(\w+)` \| .* \| (.*) \|$", TEXT, re.M))
STEPS = re.findall(r"`([\w/]+\.py)` `([\w.]+)`", TEXT)
LISTS = re.findall(r"(?:^\d\. .*\n)+", TEXT, re.M)


def names_in(body):
    """Names that statements define, one level deep."""
    for node in body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield node.name, node.body
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            yield from ((target.id, []) for target in targets if isinstance(target, ast.Name))


def layers():
    """Rooms from the top to the bottom; rooms of one layer have one number."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    lines = settings["tool"]["importlinter"]["contracts"][0]["layers"]
    return {room: number for number, line in enumerate(lines) for room in line.split(" | ")}


def test_every_room_has_a_row_in_the_order_of_the_layers():
    rooms = {file.parent.name for file in PACKAGE.glob("*/__init__.py")}
    assert set(ROWS) == rooms
    order = [layers()[room] for room in ROWS]
    assert order == sorted(order)


@pytest.mark.parametrize("room", ROWS)
def test_a_row_has_the_doors_of_its_room(room):
    tree = ast.parse((PACKAGE / room / "__init__.py").read_text())
    (doors,) = (
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
    )
    files = (PACKAGE / room / door for door in doors)
    doors = [x.name for x in files if x.with_suffix(".py").is_file() or x.is_dir()]
    assert re.findall(r"`(\w+)`", ROWS[room]) == sorted(doors)


@pytest.mark.parametrize(("file", "name"), sorted(set(STEPS)))
def test_a_step_is_in_its_file(file, name):
    body = ast.parse((PACKAGE / file).read_text()).body
    for part in name.split("."):
        known = dict(names_in(body))
        assert part in known, f"{file} has no {name}"
        body = known[part]


def test_walks_go_down():
    assert len(LISTS) == 6
    for steps in LISTS:
        rooms = re.findall(r"^\d\. `(\w+)/", steps, re.M)
        depth = [layers()[room] for room in rooms]
        assert len(rooms) == steps.count("\n") and depth == sorted(depth), rooms
