"""`iwopd grade`: right is exit code 0, wrong 1, input that cannot be graded 2."""

import json

import pytest
from typer.testing import CliRunner

from iwopd_megatron.cli import main as cli
from iwopd_megatron.errors import RecipeError


def run(*words):
    """(exit code, what was printed); a user's mistake is raised."""
    result = CliRunner().invoke(cli.app, ["grade", *map(str, words)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.output.strip()


@pytest.mark.parametrize(
    ("answer", "reference", "code", "line"),
    [
        (r"\frac{27}{2}", "14", 1, "wrong: 27/2 is not 14"),
        (r"\frac{27}{2}", r"\frac{54}{4}", 0, "right: both are 27/2"),
        ("-3", "-3", 0, "right: both are -3"),
        (r"First \boxed{3}, no: \boxed{4}", "4", 0, "right: both are 4"),
        ("9^{9^{9^{9^{9}}}}", "1", 1, "wrong: grading was cut at 2 s"),
    ],
)
def test_math(answer, reference, code, line):
    assert run("math", answer, reference) == (code, line)


def test_an_empty_reference_is_a_mistake():
    with pytest.raises(RecipeError, match="the reference answer is empty"):
        run("math", "5", " ")


@pytest.fixture
def files(tmp_path):
    def write(response, tests):
        paths = tmp_path / "response.txt", tmp_path / "tests.json"
        for path, text in zip(paths, (response, tests), strict=True):
            path.write_text(text)
        return paths

    return write


@pytest.mark.parametrize(("body", "code", "word"), [("2", 0, "right: "), ("3", 1, "wrong: ")])
def test_code(files, body, code, word):
    tests = json.dumps({"asserts": ["assert f() == 2"]})
    found = run("code", *files(f"def f():\n    return {body}\n", tests))
    assert found[0] == code and found[1].startswith(word) and len(found[1]) > len(word)


@pytest.mark.parametrize(
    ("tests", "sentence"),
    [
        ("[1", "tests.json is not JSON"),
        ("[1]", "tests.json is JSON, but no object"),
    ],
)
def test_tests_that_are_none(files, tests, sentence):
    with pytest.raises(RecipeError, match=sentence):
        run("code", *files("print(1)", tests))


def test_a_file_that_is_not_there(files, tmp_path):
    response, tests = files("print(1)", "{}")
    with pytest.raises(RecipeError, match="nowhere.py cannot be read: No such file"):
        run("code", tmp_path / "nowhere.py", tests)
    with pytest.raises(RecipeError, match="nowhere.json cannot be read: No such file"):
        run("code", response, tmp_path / "nowhere.json")
