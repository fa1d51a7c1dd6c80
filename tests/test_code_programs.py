"""Programs find what Python, and what the harness of their data, gives them; nothing of ours."""

import json

import pytest

from iwopd_megatron.grading.code.grader import is_right
from iwopd_megatron.grading.code.sandbox_values import long_numbers

EVALPLUS = json.dumps(
    {
        "task_id": "HumanEval/903",
        "entry_point": "f",
        "prompt": "def f(x):\n",
        "canonical_solution": "    return 2 * x\n",
        "base_input": [[1], [5]],
        "plus_input": [[0]],
        "atol": 0,
    }
)
ASSERTS = json.dumps({"asserts": ["assert f(1) == 2", "assert f(5) == 10"]})
CALLS = json.dumps({"fn_name": "f", "inputs": [[1], [5]], "outputs": [2, 10]})
STDIN = json.dumps({"inputs": ["1\n2\n", "5\n6\n"], "outputs": ["3\n", "11\n"]})
PLAIN = {"evalplus": EVALPLUS, "asserts": ASSERTS}
FUNCTIONS = PLAIN | {"calls": CALLS}


def right(code: str, tests: str) -> bool:
    return is_right(f"```python\n{code}\n```", tests)


@pytest.mark.parametrize("kind", list(PLAIN))
@pytest.mark.parametrize(
    "code",
    [
        "def f(x: List[int]): return 2 * x",
        "def f(x) -> Optional[int]: return 2 * x",
        "def f(x: 'int') -> np.ndarray: return 2 * x",
        "class P:\n    x: Missing = 2\ndef f(x): return P.x * x",
        "def f(x): return 2 * math.floor(x)",
        "def f(x): return deque([2 * x])[0]",
    ],
)
def test_a_name_without_its_import_fails(kind, code):
    """As in EvalPlus, which leaves out the imports of its own prompt too."""
    assert not right(code, PLAIN[kind])


AT_RUN_TIME = {
    "field types": "from dataclasses import dataclass, fields\n@dataclass\nclass P:\n    x: int\n"
    "def f(x): return 2 * x if fields(P)[0].type is int else 0",
    "annotations": "class P:\n    x: int\ndef f(x): return 2 * P.__annotations__['x'](x)",
    "signature": "import inspect\ndef g(x: int): pass\n"
    "def f(x): return 2 * x if inspect.signature(g).parameters['x'].annotation is int else 0",
    "type hints": "import typing\nclass P:\n    n: 'Q'\nclass Q: pass\n"
    "def f(x): return 2 * x if typing.get_type_hints(P)['n'] is Q else 0",
    "named tuple": "from typing import NamedTuple\nclass P(NamedTuple):\n    x: int\n"
    "def f(x): return 2 * P(x).x if P.__annotations__['x'] is int else 0",
    "single dispatch": "from functools import singledispatch\n@singledispatch\ndef g(x): return 0\n"
    "@g.register\ndef _(x: int): return 2 * x\ndef f(x): return g(x)",
    "future": "from __future__ import annotations\nclass P:\n    x: Missing\ndef f(x: Missing):\n"
    "    return 2 * x if P.__annotations__['x'] == 'Missing' else 0",
    "dataclass of the future": "from __future__ import annotations\nimport dataclasses, typing\n"
    "@dataclasses.dataclass\nclass P:\n    x: int\n    q: typing.ClassVar[int] = 2\n"
    "def f(x): return typing.get_type_hints(P)['x'](P(x).q * x)",
    "pickle": "import pickle\nclass P:\n    def __init__(self, x): self.x = x\n"
    "def f(x): return pickle.loads(pickle.dumps(P(2 * x))).x",
    "enum": "import enum, pickle\nclass E(enum.Enum):\n    TWO = 2\n"
    "def f(x): return pickle.loads(pickle.dumps(E.TWO)).value * x",
    "source": "import inspect\ndef g(x): return x\n"
    "def f(x): return 2 * x if inspect.getsource(g) == 'def g(x): return x\\n' else 0",
    "module": "import sys\ndef g(x): return 2 * x\ndef f(x): return sys.modules[__name__].g(x)",
    "main module": "def g(x): return 2 * x\n"
    "def f(x):\n    import __main__\n    return __main__.g(x)",
    "globals": "def g(x): return 2 * x\ndef f(x): return globals()['g'](x)",
    "twice defined": "g = 3\ndef g(x): return 2 * x\ndef f(x): return g(x)",
    "type alias": "from typing import Generic, TypeVar\nT = TypeVar('T')\nclass B(Generic[T]):\n"
    "    def __init__(self, x: T): self.x = x\ndef f(x): return 2 * B[int](x).x",
}


@pytest.mark.parametrize(
    ("kind", "name"),
    [("asserts", name) for name in AT_RUN_TIME]
    + [("evalplus", name) for name in ("field types", "pickle", "globals", "single dispatch")]
    + [("calls", name) for name in ("dataclass of the future", "source", "main module")],
)
def test_what_python_knows_of_a_program(kind, name):
    assert right(AT_RUN_TIME[name], FUNCTIONS[kind])


@pytest.mark.parametrize("kind", list(FUNCTIONS))
def test_nothing_of_the_harness_is_there(kind):
    """Neither as a name, but for what PRIME provides, nor in the modules."""
    names = ["job", "encode", "decode", "confine", "annotations", "os", "main", "module"]
    names += ["json", "time"] if kind != "calls" else []
    code = (
        "import sys, __main__\n"
        f"theirs = [n for n in {names} if n in globals()]\n"
        "theirs += [n for n in sys.modules if n.startswith(('sandbox', 'iwopd'))]\n"
        "def f(x): return 2 * x if not theirs and hasattr(__main__, 'f') else 0"
    )
    assert right(code, FUNCTIONS[kind])


def test_only_programs_on_standard_input_are_main():
    guarded = "if __name__ == '__main__':\n    {}"
    assert right(guarded.format("print(int(input()) + int(input()))"), STDIN)
    for tests in FUNCTIONS.values():
        stop = guarded.format("raise SystemExit(1)")
        assert right(f"def f(x): return 2 * x\nassert __name__ != 'builtins'\n{stop}", tests)


READERS = {
    "input": "print(int(input()) + int(input()))",
    "renamed": "import sys\ninput = sys.stdin.readline\nprint(int(input()) + int(input()))",
    "buffer": "import sys\nprint(sum(map(int, sys.stdin.buffer.read().split())))",
    "lines": "import sys\nprint(sum(int(line) for line in sys.stdin))",
    "open(0)": "print(sum(map(int, open(0).read().split())))",
    "os.read": "import os\nprint(sum(map(int, os.read(0, 99).split())))",
    "/dev/stdin": "print(sum(map(int, open('/dev/stdin').read().split())))",
    "fileinput": "import fileinput\nprint(sum(map(int, fileinput.input())))",
    "to its end": "total = 0\nwhile True:\n    try: total += int(input())\n"
    "    except EOFError: break\nprint(total)",
    "numpy": "import sys, numpy\nprint(numpy.array(sys.stdin.read().split(), int).sum())",
    "stdout.buffer": "import sys\nsys.stdout.buffer.write(b'%d' % (int(input()) + int(input())))",
    "os.write": "import os\nos.write(1, str(int(input()) + int(input())).encode())",
    "fast output": "import os, io, atexit\nout = io.BytesIO()\n"
    "atexit.register(lambda: os.write(1, out.getvalue()))\n"
    "out.write(b'%d' % (int(input()) + int(input())))",
    "print to itself": "import sys\nsys.stdout = open(1, 'w')\nprint(int(input()) + int(input()))",
    "exit": "print(int(input()) + int(input()))\nexit()",
    "quit": "print(int(input()) + int(input()))\nquit(0)",
    "sys.exit": "import sys\nprint(int(input()) + int(input()))\nsys.exit(0)",
    "to standard error": "import sys\nprint('hm', file=sys.stderr)\n"
    "print(sum(map(int, sys.stdin)))",
    "much to standard error": "import sys\nsys.stderr.write('x' * 2**25)\n"
    "print(sum(map(int, sys.stdin)))",
    "thread": "import sys, threading\nsys.setrecursionlimit(10**6)\nthreading.stack_size(2**27)\n"
    "def g(n): return 0 if n == 0 else 1 + g(n - 1)\n"
    "def main(): print(int(input()) + int(input()) + g(10**5) - 10**5)\n"
    "t = threading.Thread(target=main)\nt.start()\nt.join()",
    "file": "import os, sys\nassert os.path.exists(__file__) and sys.argv == [__file__]\n"
    "print(sum(map(int, sys.stdin)))",
    "alone": "import os\nassert os.listdir() == ['answer.py']\nprint(int(input()) + int(input()))",
    "letters": "assert 'é∑'.encode() == b'\\xc3\\xa9\\xe2\\x88\\x91'\nimport sys\n"
    "print(sum(map(int, sys.stdin)), end='\\u3000')",
    "large": "assert len(str(2**99999)) > 4300\nimport sys\nprint(sum(map(int, sys.stdin)))",
}


@pytest.mark.parametrize("name", list(READERS))
def test_ways_to_read_and_write(name):
    assert right(READERS[name], STDIN)


PROVIDED = [
    "def f(x: List[int]) -> Optional[Dict[str, Set[Tuple[int]]]]: return 2 * x",
    "def f(x): return 2 * deque([x])[0]",
    "def f(x): return 2 * math.floor(x)",
    "def f(x): return 2 * min(inf, sqrt(x * x)) // 1",
    "def f(x): return heappop([2 * x])",
    "def f(x): return heapq.nlargest(1, [2 * x])[0]",
    "def f(x): return 2 * Counter([x]).most_common()[0][0]",
    "def f(x):\n    d = defaultdict(int)\n    d[x] += 2 * x\n    return d[x]",
    "@lru_cache(None)\ndef f(x): return 2 * x",
    "@cache\ndef f(x): return 2 * x",
    "def f(x): return reduce(operator.add, [x, x])",
    "def f(x): return list(accumulate([x, x]))[-1]",
    "def f(x): return bisect_left(range(99), 2 * x)",
    "def f(x): return 2 * copy.deepcopy(x)",
    "def f(x): return int(re.sub('a', '', f'a{2 * x}'))",
    "def f(x): return 2 * x + 0 * len(string.digits)",
    "def f(x): return 2 * x if datetime.date(2020, 1, 2).day == 2 else 0",
    "def f(x): return pow(2 * x, 1, 99)",
    "def f(x): return json.loads(str(2 * x))",
    "def f(x): return 2 * x + random.randint(0, 0)",
    "class Solution:\n    def f(self, x: List[int]) -> int: return 2 * x",
    "def g(n): return 0 if n == 0 else 1 + g(n - 1)\ndef f(x): return g(2 * x + 10**5) - 10**5",
    "@cache\ndef g(n): return 0 if n == 0 else 1 + g(n - 1)\n"
    "def f(x): return g(2 * x + 20000) - 20000",
]


@pytest.mark.parametrize("code", PROVIDED)
def test_names_of_the_harness_for_calls(code):
    assert right(code, CALLS)


def test_names_of_the_harness_for_standard_input():
    code = "@cache\ndef g(n: List[int]): return 0 if n == 0 else 1 + g(n - 1)\n"
    code += "heap = deque(map(int, stdin))\nprint(sum(heap) + g(9000) - 9000 * gcd(2, 3))"
    assert right(code, STDIN)


OWN = {
    "function": "def deque(x): return 2 * x\ndef f(x): return deque(x)",
    "variable": "math = 2\ndef f(x): return math * x",
    "import": "from operator import mul as sqrt\ndef f(x): return sqrt(2, x)",
    "future": "from __future__ import annotations\ndef f(x: Missing): return 2 * x",
    "encoding": "# -*- coding: utf-8 -*-\n'''Doubles.'''\ndef f(x): return 2 * x",
    "class": "class Counter:\n    n = 2\ndef f(x): return Counter.n * x",
    "global": "def g():\n    global inf\n    inf = 2\ng()\ndef f(x): return inf * x",
}


@pytest.mark.parametrize("name", list(OWN))
def test_its_own_names_win(name):
    assert right(OWN[name], CALLS)


@pytest.mark.parametrize(
    ("name", "given", "expected", "code", "passes"),
    [
        # the harness provides heapq.merge, math.gcd and operator.add, which are not the answer
        ("merge", [[1], [2]], [1, 2],
         "class Solution:\n    def merge(self, a, b): return a + b", True),
        ("gcd", [4, 6], 2, "x = 1", False), ("gcd", [4, 6], 2, "from math import gcd", True),
        ("gcd", [4, 6], 2, "def gcd(a, b): return 2", True),
        ("f", [1], 2, "def f(x): return 0\nclass Solution:\n"
         "    def f(self, x): return 2 * x", True),
        ("f", [1], 2, "class Solution: pass\ndef f(x): return 2 * x", True),
        ("f", [1], 2, "class Solution:\n    @staticmethod\n    def f(x): return 2 * x", True),
        ("f", [1], 2, "class Solution:\n    def __init__(self): self.n = 2\n"
         "    def f(self, x): return self.n * x", True),
        ("f", [1], 2, "class Other:\n    def f(self, x): return 2 * x", False),
        ("f", [120000], list(range(120000)), "def f(n): return list(range(n))", True),
    ],
)  # fmt: skip
def test_what_is_called(name, given, expected, code, passes):
    tests = json.dumps({"fn_name": name, "inputs": [given], "outputs": [expected]})
    assert right(code, tests) == passes


def test_long_numbers():
    with long_numbers():
        pairs = {"inputs": [[10**5000]], "outputs": [10**9999]}
        tests = json.dumps({"fn_name": "f"} | pairs)
    assert right("def f(x): return x * 10**4999", tests)
    assert not right("def f(x): return x * 10**4998", tests)
    assert not right("def f(x): return 10**300000", tests)
