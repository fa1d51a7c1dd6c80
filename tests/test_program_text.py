"""Which text of a response is graded, on all kinds of fences; what EvalPlus's rule keeps of it."""

import json
import textwrap

import pytest

from iwopd_megatron.grading.code.cases import read_test_cases
from iwopd_megatron.grading.code.evalplus_text import longest_program, needed_part
from iwopd_megatron.grading.code.grader import find_program, is_right

RIGHT = "def f(x):\n    return int(2 * x)\n"
WRONG = "def f(x):\n    return 3 * x\n"
CALLS = json.dumps({"fn_name": "f", "inputs": [[1], [5]], "outputs": [2, 10]})
EVALPLUS = json.dumps(
    {
        "task_id": "HumanEval/902",
        "entry_point": "f",
        "prompt": "def f(x):\n",
        "canonical_solution": "    return 2 * x\n",
        "base_input": [[1], [5]],
        "plus_input": [[0]],
        "atol": 0,
    }
)
STDIN = json.dumps({"inputs": ["1\n", "5\n"], "outputs": ["2\n", "10\n"]})
READER = "print(2 * int(input()))\n"


def fenced(code: str, info: str = "python", fence: str = "```") -> str:
    return f"{fence}{info}\n{code}{fence}\n"


def inside(text: str, before: str) -> str:
    return textwrap.indent(text, before, lambda line: True)


FOUND = {  # {}: the program
    "plain": "Here it is:\n\n{python}\nIt doubles.",
    "output after": "{python}\nOutput:\n```\n4\n```\n",
    "named output after": "{python}\n```output\n4\n```",
    "shell after": "{python}\nRun it:\n```bash\npython answer.py\n```",
    "text and json after": "{python}\n```text\nx = 1\n```\n```json\n[1]\n```",
    "output that is Python": "{python}\n```\n[2, 4]\n```",
    "shell before": "```sh\npip install x\n```\n{python}",
    "draft before": "<think>\n```python\n{wrong}```\n</think>\n{python}",
    "draft after": "{python}\n<think>\n```python\n{wrong}```\n</think>",
    "draft begun in the prompt": "Try:\n```python\n{wrong}```\n</think>\n{python}",
    "draft never ended": "{python}\n<think>\n```python\n{wrong}```\n",
    "tildes": "~~~python\n{code}~~~\n",
    "long fence": "`````python\n{code}`````\n```\n4\n```",
    "never closed": "Here:\n```python\n{code}",
    "never closed with output": "```python\n{code}```\n```\n4",
    "windows lines": "Here:\r\n```python\r\n{code}```\r\nDone.",
    "py": "```py\n{code}```",
    "python3": "```python3\n{code}```",
    "Python": "```Python\n{code}```",
    "python 3.11": "```python3.11\n{code}```",
    "attributes": '```python title="a.py"\n{code}```',
    "pandoc": "``` {{.python .numberLines}}\n{code}```",
    "file": "```python:answer.py\n{code}```",
    "space": "``` python \n{code}``` ",
    "no language": "```\n{code}```",
    "other language": "```text\n{code}```",
    "code": "First\n```code\n{code}```\n```bash\nls -l\n```",
    "list": "1. Define it:\n\n{deep}\n2. Done.",
    "quotation": "> So:\n{quoted}",
    "indented by a tab": "- So:\n{tabs}",
    "on the list's line": "- ```python\n{inner}  ```\n",
    "behind words": "Answer: ```python\n{code}```",
    "closed behind code": "```python\n{open}```\nSo.",
    "on a long list's line": "10. ```python\n{far}    ```\nSo.",
    "another before its end": "```python\n{code}```bash\npython a.py\n```",
    "again before its end": "```python\nimport\n```python\n{code}```",
    "in Markdown": "````markdown\n# Answer\n{python}````",
    "no fence": "{code}",
    "tags": "<answer>\n{python}</answer>",
    "inline code": "Use `f` as in ```f(1)```:\n{python}",
}


def response(name: str, code: str) -> str:
    python = fenced(code)
    return FOUND[name].format(
        code=code,
        wrong=WRONG,
        python=python,
        deep=inside(python, "    "),
        open=code.rstrip("\n"),
        quoted=inside(python, "> "),
        tabs=inside(python, "\t"),
        inner=inside(code, "  "),
        far=inside(code, "    "),
    )


@pytest.mark.parametrize("name", list(FOUND))
@pytest.mark.parametrize("tests", [CALLS, EVALPLUS, STDIN], ids=["calls", "evalplus", "stdin"])
def test_program_is_found(name, tests):
    code = READER if tests == STDIN else RIGHT
    found = find_program(response(name, code), read_test_cases(tests))
    assert found.strip() == code.strip()


NONE = {
    "nothing": "",
    "words": "I do not know, sorry.",
    "a draft": f"<think>\n{fenced(RIGHT)}",
    "before the draft": f"{fenced(RIGHT)}</think>\nSo it is.",
    "another language": "```cpp\nint x;\n```",
    "a picture": "```mermaid\ngraph TD; A-->B\n```",
}


@pytest.mark.parametrize("name", list(NONE))
@pytest.mark.parametrize("tests", [CALLS, STDIN], ids=["calls", "stdin"])
def test_no_program(name, tests):
    assert find_program(NONE[name], read_test_cases(tests)) is None
    assert not is_right(NONE[name], tests)


@pytest.mark.parametrize(
    ("tests", "texts", "right"),
    [
        (CALLS, [WRONG, RIGHT], True), (CALLS, [RIGHT, WRONG], False),
        (CALLS, [RIGHT, "print(f(2))\n"], True), (CALLS, [RIGHT, "f = 3\n"], False),
        (CALLS, ["class Solution:\n    def f(self, x): return 2 * x\n", "Solution().f(2)\n"], True),
        (CALLS, ["def double(x): return 2 * x\n", "def f(x): return double(x)\n"], False),
        (STDIN, ["print(1)\n", READER], True), (STDIN, [READER, READER.replace("2", "3")], False),
        (STDIN, [READER, "solve([1, 2])\n"], True),
        (STDIN, ["def solve(x): return 2 * x\n", "print(solve(int(input())))\n"], False),
        (EVALPLUS, [WRONG, "# longer\n" + RIGHT], True),
        (EVALPLUS, ["y = 1\n" + WRONG, RIGHT], False),
        (EVALPLUS, [RIGHT, "a = f(1)\nb = f(2)\nc = f(3)\nprint(a, b, c)\n"], True),
        (EVALPLUS, ["def double(x): return 2 * x\n", "def f(x): return double(x)\n"], False),
        (EVALPLUS, ["class Solution:\n    def f(self, x): return 2 * x\n"], False),
        (json.dumps({"asserts": ["assert f(1) == 2"]}), [RIGHT, "print(f(1))\n"], True),
    ],
)  # fmt: skip
def test_several_blocks(tests, texts, right):
    assert is_right("\nThen:\n".join(map(fenced, texts)), tests) == right


def test_fences_inside_the_program_are_its_own():
    example = "    ```\n    f(1)\n    ```\n    ```python\n    f(2)\n"
    code = f'def f(x):\n    """As in\n{example}    """\n    return 2 * x\n'
    assert find_program(fenced(code), read_test_cases(CALLS)) == code
    assert is_right(fenced(code), EVALPLUS)


def test_code_in_comments_ends_nothing():
    code = "# as in ```f(1)```\ndef f(x):\n    return 2 * x  # or ```x + x```\n"
    assert find_program(fenced(code), read_test_cases(CALLS)) == code


def test_blank_lines_of_texts_stay():
    code = "def f(x):\n    s = '''\n   \n'''\n    return s\n"
    assert find_program(inside(fenced(code), "  "), read_test_cases(CALLS)) == code


@pytest.mark.parametrize(
    ("text", "program"),
    [
        (f"You can write it so.\n{RIGHT}\nThat is all, I think.", RIGHT),
        (fenced(f"Here is it:\n{RIGHT}"), RIGHT),
        ("```python\n" + RIGHT + "\ndef g(x):\n    return f(", RIGHT),
        (f"Import it (from f import x)\nimport math\n\n{RIGHT}And so", f"import math\n\n{RIGHT}"),
    ],
)  # fmt: skip
def test_longest_part_that_parses(text, program):
    assert longest_program(text, "f").strip() == program.strip()


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("", "print(f(int(input())))"), ("", "assert f(1) == 3"), ("", "f(1)"), ("", "1 / 0"),
        ("", "if __name__ == '__main__':\n    raise SystemExit(1)"),
        ("n = int(input())\n", "print(f(n))"), ("", "for n in [1]:\n    print(g(n))"),
        ("import sys\n", "def main():\n    print(f(int(sys.stdin.readline())), sys.argv)\nmain()"),
        ("", "def check(g):\n    assert g(1) == 3\ncheck(f)"), ("", "print([f(n) for n in h])"),
        ("n = input()\ndef g(x):\n    return list(map(int, x))\n", "print(g(n), f(n))"),
        ("", WRONG), ("def f(x):\n    '''To do.'''\n", ""), ("", "def g():\n    return missing"),
        ("import math\nx = 3\n", ""), ("from functools import lru_cache\n@lru_cache\n", ""),
    ],
)  # fmt: skip
def test_examples_are_left_out(before, after):
    assert is_right(fenced(before + RIGHT + after + "\n"), EVALPLUS)


NEEDED = {
    "helper": "def g(x):\n    return x + x\ndef f(x):\n    return g(x)\n",
    "helper without return": "def g(x, out):\n    out.append(2 * x)\n"
    "def f(x):\n    out = []\n    g(x, out)\n    return out[0]\n",
    "table": "t = []\nfor i in range(9):\n    t.append(2 * i)\ndef f(x):\n    return t[x]\n",
    "filled": "t = {}\nfor i in range(9): t[i] = 2 * i\ndef f(x): return t[x]\n",
    "class": "from dataclasses import dataclass\n@dataclass\nclass P:\n    x: int\n"
    "def f(x): return 2 * P(x).x\n",
    "lambda": "f = lambda x: 2 * x\n",
    "constant": "TWO: int = 2\ndef f(x): return TWO * x\n",
    "tried": "try:\n    from math import two\nexcept ImportError:\n    two = 2\n"
    "def f(x): return two * x\n",
    "counted": "n = 1\nn += 1\ndef f(x): return n * x\n",
    "same line": "n = 2; g = 1\ndef f(x): return n * x\n",
    "unpacked": "a, (b, *c) = 1, (2, 3)\ndef f(x): return b * x\n",
    "given": "import heapq\nh = [5, 3]\nheapq.heapify(h)\ndef f(x): return (h[0] - 1) * x\n",
    "executed": "s = {}\nexec('n = 2', s)\ndef f(x): return s['n'] * x\n",
    "built": "t = []\ndef build():\n    for i in range(9): t.append(2 * i)\n"
    "build()\ndef f(x): return t[x]\n",
    "set": "n = 1\ndef build():\n    global n\n    n = 2\nbuild()\ndef f(x): return n * x\n",
    "registered": "from functools import singledispatch\n@singledispatch\ndef g(x): pass\n"
    "@g.register\ndef _(x: int): return 2 * x\ndef f(x): return g(x)\n",
    "by its name": "def g(x): return 2 * x\ndef f(x): return globals()['g'](x)\n",
    "from sys": "from sys import setrecursionlimit\nsetrecursionlimit(9000)\n"
    "def g(n): return 0 if n == 0 else 1 + g(n - 1)\ndef f(x): return 2 * x + 0 * g(5000)\n",
    "recursion": "import sys\nsys.setrecursionlimit(9000)\n"
    "def g(n): return 0 if n == 0 else 1 + g(n - 1)\ndef f(x): return 2 * x + 0 * g(5000)\n",
    "wrapped": "from functools import cache\ndef f(x): return 2 * x\nf = cache(f)\n",
    "future": "from __future__ import annotations\ndef f(x: Missing): return 2 * x\n",
}


@pytest.mark.parametrize("name", list(NEEDED))
def test_what_is_needed_is_kept(name):
    assert is_right(fenced(NEEDED[name]), EVALPLUS)


def test_lines_keep_their_numbers():
    code = "print(1)\nimport math\n\nx = '''a\nb'''\n\n@g\ndef f():\n    return 1\n"
    assert needed_part(code, "f") == "\nimport math\n\n\n\n\n@g\ndef f():\n    return 1\n"
    assert needed_part("def f(:", "f") == "def f(:" and needed_part("print(1)", "f") == "print(1)"
