"""Runs one untrusted program: started by sandbox.py as `python -I sandbox_child.py JOB`.

The program finds what `python answer.py` gives it: a fresh module, no future flags of ours, its own
name and file. It runs after sandbox_filter.py took away every system call but those a computation
needs. What it says is only data to whoever started it: this process knows inputs, never the
expected outputs. Nothing but the standard library and the two modules beside it is imported, for
the package is not on its path.
"""

from __future__ import annotations

import builtins
import functools
import importlib.util
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from types import CodeType, ModuleType
from typing import Any

sys.path.insert(0, os.path.dirname(__file__))
from sandbox_filter import confine, limit  # noqa: E402
from sandbox_values import decode, encode  # noqa: E402

sys.path.pop(0)
for name in ("sandbox_filter", "sandbox_values"):
    del sys.modules[name]

# What LiveCodeBench and PRIME import in front of a program: all names of these, in this order ...
STARRED = (
    "string",
    "re",
    "datetime",
    "collections",
    "heapq",
    "bisect",
    "copy",
    "math",
    "random",
    "statistics",
    "itertools",
    "functools",
    "operator",
    "io",
    "sys",
    "json",
    "builtins",
    "typing",
)
UNNAMED = {"builtins", "typing"}  # ... and these modules themselves, without the last two
RECURSION_LIMIT = 600_000  # PRIME's; LiveCodeBench's is 50,000


class TooSlow(BaseException):
    """A call took longer than it may."""


class Missing(Exception):
    """The program does not define what is called."""


def main() -> None:
    """Run the job in the file argv[1]; what it says goes to standard output and standard error."""
    sys.set_int_max_str_digits(0)  # data was made before Python had this limit
    with open(sys.argv[1], encoding="utf-8") as file:
        job = json.load(file)
    os.remove(sys.argv[1])  # the program finds nothing but itself in its folder
    mode, path, started = job.pop("mode"), job["file"], job.pop("started")
    sys.argv = [path]
    limit(job)
    errors, report = os.dup(2), os.fdopen(os.dup(1), "w", encoding="utf-8")
    silence = os.open(os.devnull, os.O_RDWR)
    for number in (2,) if mode == "stdin" else (0, 1, 2):
        os.dup2(silence, number)
    if mode == "call":
        job["inputs"] = decode(job["inputs"])
    if (3, 12) <= sys.version_info < (3, 14):
        _let_caches_recurse()
    module = _module("__main__" if mode == "stdin" else "answer", path)
    if job.pop("preamble"):
        module.__dict__.update(_preamble())
        sys.setrecursionlimit(RECURSION_LIMIT)
    tests = {"stdin": run, "call": call, "asserts": check_asserts}[mode](job, module, report)
    confine()
    os.write(started, b"1")
    os.close(started)
    _count(tests, path, errors, is_main=mode == "stdin")
    if mode != "stdin":
        report.flush()
        os._exit(0)  # whatever the program registered for the end does not run


def _module(name: str, path: str) -> ModuleType:
    """Make an empty module, which `import __main__`, pickle, dataclasses and typing find."""
    module = ModuleType(name)
    module.__dict__.update({"__file__": path, "__builtins__": builtins})
    sys.modules[name] = sys.modules["__main__"] = module
    return module


def _let_caches_recurse() -> None:
    """Have functools cache by its own Python code, whose recursion only the program limits.

    Its C code, which it prefers, stops some hundred calls deep in Python 3.12 and some thousand in
    3.13, whatever the recursion limit; programs were tested with versions that go on.
    """
    spec = importlib.util.find_spec("functools")
    assert spec is not None and spec.loader is not None
    python_only = importlib.util.module_from_spec(spec)
    kept, sys.modules["_functools"] = sys.modules["_functools"], None  # type: ignore[assignment]
    spec.loader.exec_module(python_only)
    sys.modules["_functools"] = kept
    vars(functools)["_lru_cache_wrapper"] = vars(python_only)["_lru_cache_wrapper"]


def _preamble() -> dict[str, Any]:
    """Return the names that LiveCodeBench and PRIME provide; a program may define them anew."""
    names: dict[str, Any] = {}
    for module in map(importlib.import_module, STARRED):
        public = getattr(module, "__all__", None) or [x for x in vars(module) if x[0] != "_"]
        names |= {name: getattr(module, name) for name in public}
    return names | {name: sys.modules[name] for name in STARRED if name not in UNNAMED}


def _count(tests: Iterator[None], path: str, errors: int, is_main: bool) -> None:
    """Run the tests; write the first failure to the descriptor `errors`, with how many passed."""
    passed = 0
    try:
        for _ in tests:
            passed += 1
    except SystemExit as error:
        if is_main:
            raise
        failure = {"kind": "exit", "text": str(error.code)}
    except TooSlow:
        failure = {"kind": "slow", "text": ""}
    except Missing as error:
        failure = {"kind": "missing", "text": str(error)}
    except BaseException as error:
        failure = {"kind": type(error).__name__} | _described(error, path)
    else:
        return
    os.write(errors, json.dumps(failure | {"passed": passed}).encode())
    if is_main:
        sys.exit(1)
    os._exit(1)


def _described(error: BaseException, path: str) -> dict[str, Any]:
    """Return what Python says of an error, and the last line of the program that it passed."""
    line = error.lineno if isinstance(error, SyntaxError) and error.filename == path else None
    for frame, number in traceback.walk_tb(error.__traceback__):
        if frame.f_code.co_filename == path:
            line = number
    text = traceback.format_exception_only(type(error), error)[-1].strip()
    return {"text": text[:300], "line": line}


def _compiled(job: dict[str, Any]) -> CodeType:
    return compile(job.pop("code"), job["file"], "exec", dont_inherit=True)


def run(job: dict[str, Any], module: ModuleType, report: Any) -> Iterator[None]:
    """Run the program on its standard input: one test."""
    exec(_compiled(job), module.__dict__)
    yield


def call(job: dict[str, Any], module: ModuleType, report: Any) -> Iterator[None]:
    """Call the function with each input; write a line [encoded result, processor seconds]."""
    provided = dict(module.__dict__)
    code = _compiled(job)
    exec(code, module.__dict__)
    function = _function(job, module, code, provided)
    for arguments, seconds in zip(job.pop("inputs"), job["seconds"], strict=True):
        signal.signal(signal.SIGPROF, _too_slow)
        signal.setitimer(signal.ITIMER_PROF, seconds)
        start = time.process_time()
        value = function(*arguments)
        taken = time.process_time() - start
        signal.setitimer(signal.ITIMER_PROF, 0)
        report.write(json.dumps([encode(value, job["max_items"]), taken]) + "\n")
        yield


def _function(
    job: dict[str, Any], module: ModuleType, code: CodeType, provided: dict[str, Any]
) -> Callable[..., Any]:
    """Return the method of class Solution where those count, or else the program's function."""
    name, scope = job["function"], module.__dict__
    if job["methods"] and hasattr(scope.get("Solution"), name):
        return getattr(scope["Solution"](), name)
    is_theirs = name in scope and scope[name] is provided.get(name) and name not in code.co_names
    if name not in scope or is_theirs:
        raise Missing(name)
    return scope[name]


def check_asserts(job: dict[str, Any], module: ModuleType, report: Any) -> Iterator[None]:
    """Run the program and its assertions; write the job's token if all held."""
    exec(_compiled(job), module.__dict__)
    for text in job.pop("asserts"):
        exec(compile(text, "<assert>", "exec", dont_inherit=True), module.__dict__)
        yield
    report.write(job.pop("token"))


def _too_slow(number: int, frame: object) -> None:
    raise TooSlow


if __name__ == "__main__":
    main()
