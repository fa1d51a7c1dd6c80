"""Answers of code problems: what is read from them, and what is refused, by name and place."""

import json

import pytest

from iwopd_megatron.config.data import Source
from iwopd_megatron.data.sources import read_source
from iwopd_megatron.errors import RecipeError
from iwopd_megatron.grading.code.cases import (
    CallCases,
    StdinCases,
    check_test_cases,
    read_test_cases,
)
from iwopd_megatron.grading.code.grader import is_right

EVALPLUS = {
    "task_id": "Mbpp/900",
    "entry_point": "f",
    "prompt": "'''Double.'''\n",
    "canonical_solution": "def f(x):\n    return 2 * x\n",
    "base_input": [[1]],
    "plus_input": [],
    "atol": 0,
}
CALLS = {"fn_name": "f", "inputs": [[1], [2]], "outputs": [2, 4]}
STDIN = {"inputs": ["1\n", "2\n"], "outputs": ["2\n", "4\n"]}
ASSERTS = {"asserts": ["assert f(1) == 2", "x = f(2)\nassert x == 4, 'no'"]}
PROGRAM = "```python\ndef f(x):\n    return 2 * x\n```"


@pytest.mark.parametrize(
    "answer",
    [
        EVALPLUS,
        EVALPLUS | {"plus_input": {}},
        CALLS,
        STDIN,
        ASSERTS,
        STDIN | {"fn_name": None},
        dict.fromkeys(["asserts", "entry_point", "task_id"]) | CALLS,
        {"inputs": [["1", "2"], ""], "outputs": [["3"], "0"]},
        {"inputs": [1], "outputs": [2.5]},
    ],
)
def test_good_answers(answer):
    check_test_cases(json.dumps(answer))


REFUSED = {  # name: (answer, words of the sentence)
    "not JSON": ("assert f(1) == 2", "not JSON"),
    "cut off": (json.dumps(STDIN)[:-1], "not JSON"),
    "a number": ("42", "JSON but a number"),
    "a list": ([STDIN], "JSON but a list"),
    "JSON in JSON": (json.dumps(json.dumps(STDIN)), "JSON but a text"),
    "nothing": ({}, "no tests .it is empty."),
    "other keys": ({"tests": ["assert f(1)"], "id": 3}, "no tests .only id, tests."),
    "nulls": ({"inputs": None, "outputs": None}, "no tests .it is empty."),
    "empty": ({"inputs": [], "outputs": []}, "inputs is empty"),
    "empty calls": (CALLS | {"inputs": [], "outputs": []}, "inputs is empty"),
    "no inputs": ({"outputs": ["1"]}, "lacks 'inputs'"),
    "no outputs": (CALLS | {"outputs": None}, "lacks 'outputs'"),
    "unequal": (STDIN | {"outputs": ["2\n"]}, "2 inputs but 1 outputs"),
    "unequal calls": (CALLS | {"inputs": [[1]]}, "1 inputs but 2 outputs"),
    "a text of inputs": (STDIN | {"inputs": "1\n"}, "inputs is a text"),
    "an object of outputs": (STDIN | {"outputs": {"1": 2}}, "outputs is an object"),
    "a null input": ({"inputs": [None], "outputs": ["1"]}, r"inputs\[0\] is null"),
    "an object output": ({"inputs": ["1"], "outputs": [{}]}, r"outputs\[0\] is an object"),
    "lists of lists": ({"inputs": [[[1]]], "outputs": ["1"]}, r"inputs\[0\] is a list with a list"),
    "blank outputs": ({"inputs": ["1", "2"], "outputs": ["", "\n"]}, "all outputs are blank"),
    "no name": (CALLS | {"fn_name": ""}, "fn_name '' is not the name"),
    "a wrong name": (CALLS | {"fn_name": "Solution().f"}, "fn_name 'Solution"),
    "a number for a name": (CALLS | {"fn_name": 3}, "fn_name 3 is not"),
    "arguments without a list": (CALLS | {"inputs": [1, 2]}, r"inputs\[0\] is a number"),
    "an object of arguments": (CALLS | {"inputs": [[1], {"x": 2}]}, r"inputs\[1\] is an object"),
    "lines without JSON": (CALLS | {"inputs": ["1\n", "1\ntwo"]}, r"inputs\[1\] line 2 'two'"),
    "a blank input": (CALLS | {"inputs": ["1", ""]}, r"inputs\[1\] line 1 ''"),
    "outputs without JSON": (
        CALLS | {"inputs": ["1", "2"], "outputs": ["2", "four"]}, r"outputs\[1\] 'four'",
    ),
    "no asserts": ({"asserts": []}, "asserts is empty"),
    "a text of asserts": ({"asserts": "assert f(1) == 2"}, "asserts is a text"),
    "a number of asserts": ({"asserts": [1]}, r"asserts\[0\] is a number"),
    "asserts that compile not": ({"asserts": ["assert f(1) = 2"]}, r"asserts\[0\] is not Python"),
    "outside a function": ({"asserts": ["assert 1\nreturn 2"]}, r"asserts\[0\] is not Python"),
    "no asserts in it": ({"asserts": ["assert f(1)", "f(1) == 2"]}, r"asserts\[1\] 'f\(1\) == 2'"),
    "a blank assert": ({"asserts": [""]}, "holds no assert"),
    "asserts of pairs": ({"asserts": ["assert (f(1), 2)"]}, "tests nothing"),
    "asserts of nothing": ({"asserts": ["assert True"]}, "tests nothing"),
    "no task": (EVALPLUS | {"task_id": None}, "lacks 'task_id'"),
    "no entry point": (EVALPLUS | {"entry_point": None}, "lacks 'entry_point'"),
    "no tolerance": (EVALPLUS | {"atol": None}, "lacks 'atol'"),
    "no base tests": (EVALPLUS | {"base_input": []}, "base_input is empty"),
    "another task": (EVALPLUS | {"task_id": "LeetCode/3"}, "task_id 'LeetCode/3'"),
    "no number": (EVALPLUS | {"task_id": "Mbpp/x"}, "task_id 'Mbpp/x'"),
    "a name that no one defines": (EVALPLUS | {"entry_point": "g"}, "does not define g"),
    "a solution cut off": (EVALPLUS | {"canonical_solution": "def f(x"}, "is not Python"),
    "a list for a solution": (EVALPLUS | {"canonical_solution": []}, "canonical_solution is a li"),
    "inputs without lists": (EVALPLUS | {"base_input": [1]}, "base_input needs a list of lists"),
    "a text of plus tests": (EVALPLUS | {"plus_input": "x"}, "plus_input needs a list of lists"),
    "a text for a tolerance": (EVALPLUS | {"atol": "0"}, "atol is a text"),
}  # fmt: skip


@pytest.mark.parametrize("name", list(REFUSED))
def test_refused(name):
    answer, words = REFUSED[name]
    text = answer if isinstance(answer, str) else json.dumps(answer)
    with pytest.raises(RecipeError, match=words) as error:
        check_test_cases(text)
    assert "\n" not in str(error.value)
    with pytest.raises(RecipeError, match=words):  # and never right, nor a silent 0
        is_right(PROGRAM, text)


@pytest.mark.parametrize("name", ["not JSON", "empty", "unequal", "no asserts", "no entry point"])
def test_refused_where_rows_are_read(tmp_path, name):
    answer, words = REFUSED[name]
    row = {"question": "Double.", "answer": CALLS, "difficulty": 1, "source": "code"}
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(row | {"answer": x}) + "\n" for x in (CALLS, answer)))
    with pytest.raises(RecipeError, match=rf"data\.jsonl line 2: .*{words}"):
        read_source(Source(path=path))
    with pytest.raises(RecipeError, match=rf"data\.jsonl line 2: .*{words}"):
        read_source(Source(path=path, source="programs", grader="code"))
    assert len(read_source(Source(path=path, grader="math"))[0]) == 2


@pytest.mark.parametrize(
    ("given", "expected", "arguments", "value"),
    [
        ("1\n2", "3", [1, 2], 3), ("[1, 2]\n\"a\"\n", "[\"b\"]", [[1, 2], "a"], ["b"]),
        ("\"1\"", "\"2\"", ["1"], "2"), ("null\ntrue", "false", [None, True], False),
        ("{\"a\": 1}\r\n2", "1.5", [{"a": 1}, 2], 1.5), ("3", 4, [3], 4), (["1"], "2", ["1"], "2"),
        ([], "x", [], "x"),
    ],
)  # fmt: skip
def test_texts_of_json_lines(given, expected, arguments, value):
    tests = read_test_cases(json.dumps({"fn_name": "f", "inputs": [given], "outputs": [expected]}))
    assert tests == CallCases("f", [arguments], [value])


def test_calls_given_as_texts_are_graded():
    tests = {"fn_name": "add", "inputs": ["1\n2", '"a"\n"b"'], "outputs": ["3", '"ab"']}
    code = "```python\nclass Solution:\n    def add(self, a, b): return a + b\n```"
    assert is_right(code, json.dumps(tests)) and not is_right(PROGRAM, json.dumps(tests))


def test_lists_are_lines_on_standard_input():
    answer = {"inputs": [["1", "2"], 3], "outputs": [["3", "4"], "5"]}
    assert read_test_cases(json.dumps(answer)) == StdinCases(["1\n2", "3"], ["3\n4", "5"])


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        ('{"fn_name": "f", "inputs": [[1]], "outputs": [NaN]}', "NaN is no number of JSON"),
        ('{"fn_name": "f", "inputs": [[1]], "outputs": [2], "asserts": ["assert f(1) == 2"]}',
         "'asserts' and 'inputs', tests of two kinds"),
        ("{}", "answer has no tests .it is empty.; a code problem needs"),
    ],
)  # fmt: skip
def test_tests_that_cannot_be_meant(answer, words):
    with pytest.raises(RecipeError, match=words):
        read_test_cases(answer)
