"""Runs one untrusted program: started by sandbox.py as `python -I sandbox_child.py JOB`.

After setting its limits the process gives up, by a seccomp filter that nothing can lift, every
system call but those a computation needs: no sockets, no new processes, no file opened for writing,
created, renamed or deleted, no signal to others. What the program says is only data to whoever
started it: this process knows inputs, never the expected outputs. Imports nothing but the standard
library, for it runs without the package on its path.
"""

from __future__ import annotations

import collections
import ctypes
import decimal
import fractions
import hashlib
import json
import marshal
import math
import os
import platform
import resource
import signal
import struct
import sys
import time
from dataclasses import dataclass
from typing import Any

NO_SANDBOX = 97  # exit code: the kernel has no seccomp, or the machine is not x86-64
MAX_ITEMS = 100_000  # of a result; of a larger one only a digest leaves the sandbox

# x86-64 numbers; everything that is not here fails with EPERM.
ALLOWED = {
    "read": 0, "write": 1, "close": 3, "stat": 4, "fstat": 5, "lstat": 6, "poll": 7, "lseek": 8,
    "mmap": 9, "mprotect": 10, "munmap": 11, "brk": 12, "rt_sigaction": 13, "rt_sigprocmask": 14,
    "rt_sigreturn": 15, "ioctl": 16, "pread64": 17, "readv": 19, "writev": 20, "access": 21,
    "select": 23, "sched_yield": 24, "mremap": 25, "madvise": 28, "dup": 32, "dup2": 33,
    "nanosleep": 35, "getitimer": 36, "alarm": 37, "setitimer": 38, "getpid": 39, "exit": 60,
    "uname": 63, "fcntl": 72, "getcwd": 79, "readlink": 89, "gettimeofday": 96, "getrlimit": 97,
    "getrusage": 98, "sysinfo": 99, "times": 100, "getuid": 102, "getgid": 104, "geteuid": 107,
    "getegid": 108, "getppid": 110, "getpgrp": 111, "sigaltstack": 131, "gettid": 186, "time": 201,
    "futex": 202, "sched_getaffinity": 204, "getdents64": 217, "set_tid_address": 218,
    "clock_gettime": 228, "clock_getres": 229, "clock_nanosleep": 230, "exit_group": 231,
    "newfstatat": 262, "readlinkat": 267, "faccessat": 269, "pselect6": 270, "ppoll": 271,
    "set_robust_list": 273, "getcpu": 309, "getrandom": 318, "membarrier": 324, "statx": 332,
    "rseq": 334, "faccessat2": 439,
}  # fmt: skip
OPEN, CLONE, OPENAT, PRLIMIT64, CLONE3 = 2, 56, 257, 302, 435
EPERM, ENOSYS = 1, 38


def main() -> None:
    with open(sys.argv[1], encoding="utf-8") as file:
        job = json.load(file)
    sys.argv = ["answer.py"]
    sys.set_int_max_str_digits(0)
    limit(job)
    if job["mode"] == "stdin":
        confine()
        exec(compile(job["code"], "answer.py", "exec"), {"__name__": "__main__"})
        return
    report = os.fdopen(os.dup(1), "w", encoding="utf-8")
    silence = os.open(os.devnull, os.O_RDWR)
    for number in (0, 1, 2):
        os.dup2(silence, number)
    confine()
    {"call": call, "asserts": check_asserts}[job["mode"]](job, report)
    report.flush()
    os._exit(0)  # whatever the program registered for the end does not run


def call(job: dict[str, Any], report: Any) -> None:
    """One line an input: the encoded result and its processor seconds; ends at a failure."""
    scope: dict[str, Any] = {}
    exec(compile(job["code"], "answer.py", "exec"), scope)
    function = scope.get(job["function"]) or getattr(scope["Solution"](), job["function"])
    for arguments, seconds in zip(decode(job["inputs"]), job["seconds"], strict=True):
        signal.signal(signal.SIGPROF, _too_slow)
        signal.setitimer(signal.ITIMER_PROF, seconds)
        start = time.process_time()
        value = function(*arguments)
        taken = time.process_time() - start
        signal.setitimer(signal.ITIMER_PROF, 0)
        report.write(json.dumps([encode(value, MAX_ITEMS), taken]) + "\n")


def check_asserts(job: dict[str, Any], report: Any) -> None:
    """The token of the job, if no assertion failed."""
    token = job.pop("token")
    exec(compile("\n".join([job.pop("code"), *job.pop("asserts")]), "answer.py", "exec"), {})
    report.write(token)


def _too_slow(number: int, frame: object) -> None:
    raise TimeoutError


def limit(job: dict[str, Any]) -> None:
    """Memory, processor time, size of files (the output), no core dump; dies with its parent."""
    memory, cpu = job["memory_mb"] * 2**20, math.ceil(job["seconds_in_all"])
    for name, value in (
        (resource.RLIMIT_AS, memory), (resource.RLIMIT_CPU, cpu), (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_FSIZE, job["output_mb"] * 2**20), (resource.RLIMIT_NOFILE, 32),
        (resource.RLIMIT_STACK, min(memory, 2**26)),
    ):  # fmt: skip
        resource.setrlimit(name, (value, value))
    set_parent_death_signal = 1
    ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)
    if os.getppid() != job["parent"]:
        os._exit(1)


def confine() -> None:
    """Install the filter for good; exits with NO_SANDBOX where that is impossible."""
    if platform.machine() != "x86_64" or sys.platform != "linux":
        os._exit(NO_SANDBOX)
    program = b"".join(struct.pack("HBBI", *step) for step in _filter())
    buffer = ctypes.create_string_buffer(program, len(program))
    filters = struct.pack("HxxxxxxP", len(program) // 8, ctypes.addressof(buffer))
    libc = ctypes.CDLL(None, use_errno=True)
    no_new_privileges, set_seccomp, mode_filter = 38, 22, 2
    if libc.prctl(no_new_privileges, 1, 0, 0, 0) or libc.prctl(
        set_seccomp, mode_filter, ctypes.create_string_buffer(filters, len(filters)), 0, 0
    ):
        os._exit(NO_SANDBOX)


def _filter() -> list[tuple[int, int, int, int]]:
    """Classic BPF over struct seccomp_data: nr at 0, architecture at 4, arguments from 16."""
    load, equal, is_any_bit, give = 0x20, 0x15, 0x45, 0x06
    allow, kill, error = 0x7FFF0000, 0x80000000, 0x00050000
    x86_64, not_read_only, new_thread = 0xC000003E, 0o3 | os.O_CREAT | os.O_TRUNC, 0x00010000
    steps = [(load, 0, 0, 4), (equal, 1, 0, x86_64), (give, 0, 0, kill), (load, 0, 0, 0)]
    temporary_file = 0x400000
    for number, argument in ((OPEN, 1), (OPENAT, 2)):
        steps += [
            (equal, 0, 4, number), (load, 0, 0, 16 + 8 * argument),
            (is_any_bit, 0, 1, not_read_only | temporary_file), (give, 0, 0, error | EPERM),
            (give, 0, 0, allow),
        ]  # fmt: skip
    steps += [
        (equal, 0, 4, CLONE), (load, 0, 0, 16),
        (is_any_bit, 1, 0, new_thread), (give, 0, 0, error | EPERM), (give, 0, 0, allow),
    ]  # fmt: skip
    steps += [  # reading a limit has no new one: both halves of the pointer are 0
        (equal, 0, 6, PRLIMIT64), (load, 0, 0, 32), (equal, 0, 3, 0), (load, 0, 0, 36),
        (equal, 0, 1, 0), (give, 0, 0, allow), (give, 0, 0, error | EPERM),
    ]  # fmt: skip
    steps += [(equal, 0, 1, CLONE3), (give, 0, 0, error | ENOSYS)]  # glibc then uses clone
    for number in ALLOWED.values():
        steps += [(equal, 0, 1, number), (give, 0, 0, allow)]
    return [*steps, (give, 0, 0, error | EPERM)]


def encode(value: Any, max_items: int | None = None) -> Any:
    """A value as JSON: containers as [kind, items]; subclasses as what they derive from.

    With `max_items`, a larger one is ["digest", SHA-256], equal for equal values of equal types.
    """
    if max_items is not None and _items(value, max_items) > max_items:
        # format 0 has no back references, so that it depends on nothing but the value
        return ["digest", hashlib.sha256(marshal.dumps(value, 0)).hexdigest()]
    if value is None or type(value) in (bool, int, float, str):
        return value
    for kind, items in (("list", list), ("tuple", tuple), ("set", set), ("frozenset", frozenset)):
        if isinstance(value, items):
            return [kind, [encode(item) for item in items.__iter__(value)]]
    if isinstance(value, collections.deque):
        return ["deque", [encode(item) for item in value]]
    if isinstance(value, dict):
        return ["dict", [[encode(key), encode(item)] for key, item in dict.items(value)]]
    if isinstance(value, (bytes, bytearray)):
        return ["bytes", value.hex()]
    if isinstance(value, complex):
        return ["complex", [value.real, value.imag]]
    if isinstance(value, range):
        return ["range", [value.start, value.stop, value.step]]
    if isinstance(value, (decimal.Decimal, fractions.Fraction)):
        return [type(value).__name__.lower(), str(value)]
    for kind in (int, float, str):
        if isinstance(value, kind):
            return kind(value)
    if type(value).__module__ == "numpy" and hasattr(value, "tolist"):
        items = value.tolist()  # a scalar's is a plain number
        return ["array", encode(items)] if isinstance(items, list) else encode(items)
    return ["opaque", type(value).__name__]


def _items(value: Any, enough: int) -> int:
    """Values inside a value; counting stops soon after `enough`."""
    if not isinstance(value, (list, tuple, dict, set, frozenset)):
        return 1
    count = 0
    for item in value:
        count += _items(item, enough - count)
        if count > enough:
            break
    return count


@dataclass(frozen=True)
class Digest:
    """Stands for a large value; equal to that of an equal one."""

    sha256: str


class Opaque:
    """Stands for a value that is no data: not None, and equal to nothing."""


def decode(data: Any) -> Any:
    """What `encode` was given."""
    if not isinstance(data, list):
        return data
    kind, content = data
    if kind == "dict":
        return {decode(key): decode(item) for key, item in content}
    if kind in ("list", "tuple", "set", "frozenset", "deque"):
        make = {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset}
        return make.get(kind, collections.deque)(decode(item) for item in content)
    if kind == "array":
        import numpy

        return numpy.array(decode(content))
    simple = {
        "bytes": bytes.fromhex, "complex": lambda x: complex(*x), "range": lambda x: range(*x),
        "decimal": decimal.Decimal, "fraction": fractions.Fraction, "opaque": lambda _: Opaque(),
        "digest": Digest,
    }  # fmt: skip
    return simple[kind](content)


if __name__ == "__main__":
    main()
