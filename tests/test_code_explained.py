"""Why a program is right or wrong, in a sentence; what fails in the sandbox itself is no grade."""

import json
import os
import signal
import time
from pathlib import Path

import pytest

from iwopd_megatron.errors import UserError
from iwopd_megatron.grading.code import sandbox as sandbox_module
from iwopd_megatron.grading.code.grader import explain, is_right
from iwopd_megatron.grading.code.sandbox import SandboxError, sandbox

CALLS = json.dumps({"fn_name": "f", "inputs": [[1], [5]], "outputs": [2, 10]})
STDIN = json.dumps({"inputs": ["1\n", "5\n"], "outputs": ["2\n", "10\n"]})
ASSERTS = json.dumps({"asserts": ["assert f(1) == 2", "assert f(5) == 10"]})
EVALPLUS = json.dumps(
    {
        "task_id": "HumanEval/904",
        "entry_point": "f",
        "prompt": "def f(x):\n",
        "canonical_solution": "    return 2 * x\n",
        "base_input": [[1], [5]],
        "plus_input": [[0]],
        "atol": 0,
    }
)


REASONS = [
    (CALLS, "def f(x): return 2 * x", "passes 2 tests"),
    (EVALPLUS, "def f(x): return 2 * x", "passes 3 tests"),
    (ASSERTS, "def f(x): return 2 * x", "passes 2 tests"),
    (STDIN, "print(2 * int(input()))", "passes 2 tests"),
    (CALLS, "def f(x): return 2 if x == 1 else 9", "test 2 of 2, input [5]: expected 10, got 9"),
    (CALLS, "def f(x):\n\n    return 2 // (x - 5) ** 2 + 2",
     "test 2 of 2, input [5]: it raises ZeroDivisionError: integer division or modulo by zero in "
     "line 3"),
    (CALLS, "def g(x): return 2", "test 1 of 2, input [1]: it does not define f"),
    (CALLS, "def f(x):\n    return y", "it raises NameError: name 'y' is not defined in line 2"),
    (CALLS, "x = 1\ndef f(x) return x", "it raises SyntaxError: expected ':' in line 2"),
    (CALLS, "def f(x, y): return x", "it raises TypeError: f() missing 1 required positional"),
    (CALLS, "def f(x): raise SystemExit", "it ends itself before its tests are done"),
    (CALLS, "import os\ndef f(x): os._exit(0)", "it ends its process before its tests are done"),
    (CALLS, "def f(x): return 'x' * 10**10", "it needs more than 4096 MB of memory"),
    (CALLS, "import ctypes\ndef f(x): ctypes.string_at(0)", "it crashes (SIGSEGV)"),
    (CALLS, "def f(x): return ['x' * 10**7, 'x' * 10**7]", "it writes more than 16 MB"),
    (STDIN, "print(2)", r"test 2 of 2, input '5\n': expected '10\n', got '2\n'"),
    (STDIN, "print(2)\nimport sys\nsys.exit(3)", r"test 1 of 2, input '1\n': it ends with code 3"),
    (STDIN, "x = input()\nprint(2 // (int(x) - 1))", "it raises ZeroDivisionError"),
    (STDIN, "print(2 * int(input()), input())", "EOFError: EOF when reading a line in line 1"),
    (ASSERTS, "def f(x): return 2", "assert 2 of 2, 'assert f(5) == 10': it raises AssertionError"),
    (ASSERTS, "def f(x):\n    return y", "assert 1 of 2, 'assert f(1) == 2': it raises NameError"),
    (ASSERTS, "raise SystemExit(0)", "it ends itself before its tests are done"),
    (EVALPLUS, "def f(x): return 2 * x + x // 5",
     "base test 2 of 2, input [5]: expected 10, got 11"),
    (EVALPLUS, "def f(x):\n    return 2 * x * x // x",
     "plus test 1 of 1, input [0]: it raises ZeroDivisionError: integer division or modulo by zero "
     "in line 2"),
    (EVALPLUS, "def g(x): return 2", "it does not define f"),
]  # fmt: skip


@pytest.mark.parametrize(("tests", "code", "reason"), REASONS)
def test_reasons(tests, code, reason):
    right, words = explain(f"```python\n{code}\n```", tests)
    assert right == ("passes" in reason) == is_right(f"```python\n{code}\n```", tests)
    assert reason in words and "\n" not in words and len(words) < 700


@pytest.mark.parametrize("response", ["I cannot tell.", "```cpp\nint x;\n```", "<think>\nx = 1"])
def test_no_program(response):
    right, reason = explain(response, STDIN)
    assert not right and reason.startswith("no program found")


def test_time_limits(monkeypatch):
    monkeypatch.setattr("iwopd_megatron.grading.code.grader.SECONDS", 0.5)
    endless = "```python\ndef f(x):\n    while True: pass\n{}\n```"
    assert "a call takes longer than it may" in explain(endless.format(""), CALLS)[1]
    assert "limit of 0.5 processor seconds" in explain(endless.format("f(input())"), STDIN)[1]
    assert "limit of 0.5 processor seconds" in explain(endless.format(""), ASSERTS)[1]


def test_what_the_program_prints_is_shortened():
    right, reason = explain("```python\ninput()\nprint('x' * 10**6)\n```", STDIN)
    assert not right and "xxx ... xxx" in reason and len(reason) < 400


@pytest.mark.parametrize("mode", ["main", "call", "asserts"])
@pytest.mark.parametrize("code", [97, 0, 1, 120])
def test_no_exit_code_is_taken_for_trouble(mode, code):
    tests = {"main": STDIN, "call": CALLS, "asserts": ASSERTS}[mode]
    for way in ("import sys; sys.exit({})", "import os; os._exit({})"):
        assert not is_right(f"```python\n{way.format(code)}\n```", tests)


def test_the_token_of_asserts_is_not_in_the_folder():
    code = (
        "import json, os\nfor name in os.listdir():\n    text = open(name).read()\n"
        "    if text[0] == '{':\n        for fd in range(3, 20):\n"
        "            try: os.write(fd, json.loads(text)['token'].encode())\n"
        "            except OSError: pass\n        os._exit(0)\n"
    )
    assert not is_right(f"```python\n{code}```", ASSERTS)


@pytest.mark.parametrize("tests", [STDIN, CALLS, ASSERTS, EVALPLUS])
def test_a_broken_sandbox_is_no_grade(tests, tmp_path, monkeypatch):
    broken = tmp_path / "child.py"
    broken.write_text("raise OSError('no memory left')\n")
    monkeypatch.setattr(sandbox_module, "CHILD", broken)
    with pytest.raises(SandboxError, match="did not start: OSError: no memory left"):
        is_right("```python\ndef f(x): return 2 * x\n```", tests)
    broken.write_text("import os\nos._exit(97)\n")
    with pytest.raises(UserError, match="seccomp"):
        is_right("```python\ndef f(x): return 2 * x\n```", tests)


def test_a_program_killed_from_outside_is_no_grade(monkeypatch):
    """As the kernel does where memory ends."""

    def kill_once_it_runs(process, seconds):
        while "Seccomp:\t2" not in Path(f"/proc/{process.pid}/status").read_text():
            time.sleep(0.01)
        time.sleep(0.3)
        os.kill(process.pid, signal.SIGKILL)
        return process.wait()

    monkeypatch.setattr(sandbox_module, "_end_of", kill_once_it_runs)
    with sandbox() as box, pytest.raises(SandboxError, match="killed from outside"):
        box.read_stdin("import time\ntime.sleep(60)", "", 9)


@pytest.mark.parametrize("text", ["b'{]'", "b'[' * 10**5", "b'[3]'", "b'{\"kind\": []}'"])
def test_a_program_that_garbles_its_report_is_wrong(text):
    code = (
        f"import os\nfor fd in range(3, 9):\n    try: os.write(fd, {text})\n"
        "    except OSError: pass\n"
    )
    for tests in (CALLS, ASSERTS, STDIN):
        assert not is_right(f"```python\n{code}1 / 0\n```", tests)
        assert not is_right(f"```python\n{code}os._exit(0)\n```", tests)
