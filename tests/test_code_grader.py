"""Programs in answers: right, wrong, endless and malicious ones; EvalPlus's rules on its schema."""

import json
import os
import threading
from pathlib import Path

import pytest

from iwopd_megatron.errors import UserError
from iwopd_megatron.grading.code.grader import is_right, same_output
from iwopd_megatron.grading.code.sandbox import sandbox

# Problems of EvalPlus's schema; Mbpp/2 and Mbpp/124 have inputs that are tuples and complex.
PROBLEMS = {
    "list": {
        "task_id": "HumanEval/900", "prompt": "def grow(xs):\n    '''Each element plus one.'''\n",
        "entry_point": "grow", "canonical_solution": "    return [x + 1 for x in xs]\n",
        "base_input": [[[1, 2]], [[]]], "plus_input": [[[10**30, -1]], [[0.5]]], "atol": 0,
    },
    "set": {
        "task_id": "Mbpp/2", "prompt": "'''Shared.'''\n", "entry_point": "similar_elements",
        "canonical_solution": "def similar_elements(a, b):\n  return tuple(set(a) & set(b))\n",
        "base_input": [[[3, 4, 5], [5, 4]]], "plus_input": [[[], [1]], [["a"], ["a", "b"]]],
        "atol": 0,
    },
    "complex": {
        "task_id": "Mbpp/124", "prompt": "'''Angle.'''\n", "entry_point": "angle_complex",
        "canonical_solution": "import cmath\ndef angle_complex(a, b):\n"
        "  return cmath.phase(a + b)\n",
        "base_input": [["0.0", "1j"]], "plus_input": [["2.0", "1j"]], "atol": 1e-06,
    },
    "match": {
        "task_id": "Mbpp/903", "prompt": "'''Matches?'''\n", "entry_point": "check_str",
        "canonical_solution": "import re\ndef check_str(s):\n  return re.match('[a-z]+', s)\n",
        "base_input": [["abc"]], "plus_input": [["123"]], "atol": 0,
    },
    "large": {
        "task_id": "HumanEval/901", "prompt": "def count(n):\n", "entry_point": "count",
        "canonical_solution": "    return [(i, str(i)) for i in range(n)]\n",
        "base_input": [[3]], "plus_input": [[150000]], "atol": 0,
    },
}  # fmt: skip


def evalplus(name: str, code: str) -> bool:
    return is_right(f"Here:\n```python\n{code}\n```\nDone.", json.dumps(PROBLEMS[name]))


@pytest.mark.parametrize("name", list(PROBLEMS))
def test_canonical_solutions_pass(name):
    problem = PROBLEMS[name]
    assert evalplus(name, problem["prompt"] + problem["canonical_solution"])


@pytest.mark.parametrize(
    ("name", "code", "passes"),
    [
        ("list", "def grow(xs): return [x + 2 for x in xs]", False),
        ("list", "def grow(xs): return [x + 1 for x in xs if x < 9]", False),  # a plus test
        ("list", "def grow(xs): return tuple(x + 1 for x in xs)", False),  # not a list
        ("list", "def grow(xs): return [x + 1 + (1e-9 if x == 0.5 else 0) for x in xs]", True),
        ("list", "def other(xs): return [x + 1 for x in xs]", False),
        ("list", "def grow(xs) return", False),
        ("set", "def similar_elements(a, b): return list({*a} & {*b})[::-1]", True),
        ("set", "def similar_elements(a, b):\n assert isinstance(a, tuple)\n return {*a} & {*b}",
         True),
        ("set", "def similar_elements(a, b): return {*a}", False),
        ("complex", "import math\ndef angle_complex(a, b):\n"
         " z = a + b\n return math.atan2(z.imag, z.real) + 1e-8", True),
        ("complex", "def angle_complex(a, b): return 1.5", False),
        ("match", "def check_str(s): return s.isalpha()", True),
        ("match", "def check_str(s): return True", False),
        ("large", "def count(n): return [(i, '%d' % i) for i in range(n)]", True),
        ("large", "def count(n): return [(i, str(i)) for i in range(n - 1)] + [(0, '0')]", False),
    ],
)  # fmt: skip
def test_evalplus_rules(name, code, passes):
    assert evalplus(name, code) == passes


CHEATS = {
    "equal to all": "class Any(list):\n    def __eq__(self, other): return True\n"
    "def grow(xs): return Any()",
    "verdict": "import sys\ndef grow(xs):\n    sys._getframe(1).f_locals.clear()\n    return None",
    "report": "import os\nfor fd in range(3, 20):\n    try: os.write(fd, b'[[2,3],0]\\n' * 9)\n"
    "    except OSError: pass\ndef grow(xs): return 0",
    "exit": "import os\nos._exit(0)",
    "sys.exit": "import sys\nsys.exit(0)",
    "patched": "import json\njson.dumps = lambda *a: '[null, 0]'\ndef grow(xs): return None",
    "endless": "def grow(xs):\n    while True: pass",
    "endless import": "while True: pass",
    "deaf": "import signal\nsignal.setitimer = signal.signal = lambda *a: None\n"
    "def grow(xs):\n    signal.alarm(0)\n    while True:\n        try: return [x + 2 for x in xs]\n"
    "        except BaseException: pass",
}


@pytest.mark.parametrize("name", list(CHEATS))
def test_cheats_fail(name):
    assert not evalplus("list", CHEATS[name])


def test_damaged_problem():
    problem = PROBLEMS["list"] | {"canonical_solution": "    return xs.nothing\n"}
    with pytest.raises(UserError, match="HumanEval/900: its canonical solution fails on its own"):
        is_right("```\ndef grow(xs): return xs\n```", json.dumps(problem))


HARMFUL = {  # name: (a statement, what stops it)
    "fork": ("import os\nwhile True: os.fork()", "PermissionError"),
    "process": ("import subprocess\nsubprocess.run(['ls'])", "PermissionError"),
    "exec": ("import os\nos.execv('/bin/sh', ['sh'])", "PermissionError"),
    "shell": ("import os\nassert os.system('true') == 0", "AssertionError"),
    "socket": ("import socket\nsocket.create_connection(('127.0.0.1', 80))", "PermissionError"),
    "write": ("open(victim, 'w')", "PermissionError"),
    "append": ("open(victim, 'a')", "PermissionError"),
    "create": ("open(victim + '.new', 'x')", "PermissionError"),
    "read and write": ("open(victim, 'r+')", "PermissionError"),
    "delete": ("import os\nos.remove(victim)", "PermissionError"),
    "delete all": ("import shutil\nshutil.rmtree(folder)", "PermissionError"),
    "rename": ("import os\nos.rename(victim, victim + '2')", "PermissionError"),
    "truncate": ("import os\nos.truncate(victim, 0)", "PermissionError"),
    "mode": ("import os\nos.chmod(victim, 0o777)", "PermissionError"),
    "folder": ("import os\nos.mkdir('x')", "PermissionError"),
    "link": ("import os\nos.symlink('/', 'x')", "PermissionError"),
    "kill": ("import os\nos.kill(os.getppid(), 9)", "PermissionError"),
    "memory file": ("import os\nos.memfd_create('x')", "PermissionError"),
    "memory": ("x = 'x' * 700_000_000", "MemoryError"),
    "raised limit": ("import resource\n"
                     "resource.setrlimit(resource.RLIMIT_AS, (2**40, 2**40))", "Error"),
    "raw call": ("import ctypes\nc = ctypes.CDLL(None, use_errno=True)\n"
                 "assert c.syscall(41, 2, 1, 0) >= 0, ctypes.get_errno()", "AssertionError: 1"),
}  # fmt: skip


@pytest.mark.parametrize("name", list(HARMFUL))
def test_harm_is_stopped(tmp_path, name):
    victim = tmp_path / "folder" / "victim"
    victim.parent.mkdir()
    victim.write_text("alive")
    statement, stopped = HARMFUL[name]
    body = "".join(f"    {line}\n" for line in statement.splitlines())
    code = (
        f"victim, folder = {str(victim)!r}, {str(victim.parent)!r}\ntry:\n{body}"
        "except BaseException as error:\n    print(type(error).__name__, error, sep=': ')\n"
        "else:\n    print('done')\n"
    )
    with sandbox(memory_mb=512) as box:
        outcome = box.read_stdin(code, "", 20)
    assert stopped in outcome.output, outcome
    assert victim.read_text() == "alive" and os.listdir(victim.parent) == ["victim"]


@pytest.mark.parametrize(
    ("code", "status"),
    [
        ("while True: pass", "timeout"),
        ("import time\ntime.sleep(100)", "timeout"),
        ("while True: print('x' * 10**6)", "failed"),
        ("import sys\nsys.exit(3)", "failed"),
        ("import ctypes\nctypes.string_at(0)", "failed"),
        ("import os\nos.abort()", "failed"),
        ("import sys\nsys.exit()", "ok"),
    ],
)
def test_how_programs_end(code, status):
    with sandbox(memory_mb=512) as box:
        assert box.read_stdin(code, "", 0.7).status == status


def test_what_programs_may_do():
    code = (
        "import sys, threading, numpy\n"
        "def main():\n    print(sum(map(int, open(0).read().split())), numpy.ones(2).sum())\n"
        "threading.stack_size(2**25)\nt = threading.Thread(target=main)\nt.start()\nt.join()\n"
    )
    with sandbox() as box:
        assert box.read_stdin(code, "1 2\n3\n", 20).output == "6 2.0\n"
        assert threading.active_count() >= 1 and not Path("x").exists()


STDIN = json.dumps({"inputs": ["2\n", "21\n"], "outputs": ["4\n", "42\n"]})
CALLS = json.dumps({"fn_name": "pair", "inputs": [[1], [2]], "outputs": [[[1, 1]], [2, 2]]})
ASSERTS = json.dumps({"asserts": ["assert f(2) == 4", "assert f(0) == 0"]})


@pytest.mark.parametrize(
    ("tests", "code", "passes"),
    [
        (STDIN, "print(int(input()) * 2)", True),
        (STDIN, "import sys\nsys.stdout.write(f'  {2 * int(sys.stdin.readline())}')", True),
        (STDIN, "if __name__ == '__main__': print(int(input()) * 2)", True),
        (STDIN, "print(4)", False),
        (STDIN, "print(int(input()) * 2); raise SystemExit(1)", False),
        (CALLS, "def pair(x): return (x, x)", True),
        (CALLS, "class Solution:\n    def pair(self, x): return [x, x]", True),
        (CALLS, "def pair(x): return [x]", False),
        (ASSERTS, "def f(x): return 2 * x", True),
        (ASSERTS, "def f(x): return 4", False),
        (ASSERTS, "import os\nos._exit(0)", False),
        (ASSERTS, "raise SystemExit(0)", False),
    ],
)
def test_eurus(tests, code, passes):
    assert is_right(f"```python\n{code}\n```", tests) == passes


@pytest.mark.parametrize(
    ("output", "expected", "same"),
    [
        ("1 2\n3\n", "1 2 3", True), ("0.3333333", "0.33333333333", True), ("1", "1.0", True),
        ("1.5", "1", False), ("1", "2", False), ("1 2", "1", False), ("a.b", "a.c", False),
        ("", "", True), ("nan", "1.0", False),
    ],
)  # fmt: skip
def test_same_output(output, expected, same):
    assert same_output(output, expected) == same
