"""What a process of the sandbox may still do: limits, and a seccomp filter that nothing lifts.

Imports nothing but the standard library, for sandbox_child.py uses it without the package.
"""

from __future__ import annotations

import ctypes
import math
import os
import platform
import resource
import signal
import struct
import sys
from typing import Any

NO_SANDBOX = 97  # exit code: the kernel has no seccomp, or the machine is not x86-64

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


def limit(job: dict[str, Any]) -> None:
    """Limit this process's memory, processor time, files and output; it dies with its parent."""
    memory, cpu = job["memory_mb"] * 2**20, math.ceil(job["seconds_in_all"])
    for name, value in (
        (resource.RLIMIT_AS, memory),
        (resource.RLIMIT_CPU, cpu),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_FSIZE, job["output_mb"] * 2**20),
        (resource.RLIMIT_NOFILE, 32),
        (resource.RLIMIT_STACK, min(memory, 2**26)),
    ):
        resource.setrlimit(name, (value, value))
    set_parent_death_signal = 1
    ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)
    if os.getppid() != job["parent"]:
        os._exit(1)


def confine() -> None:
    """Install the filter for good; exit with NO_SANDBOX where that is impossible."""
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
    """Return the filter's steps (code, jump if true, jump if false, constant).

    Classic BPF over struct seccomp_data: nr at 0, architecture at 4, arguments from 16.
    """
    load, equal, is_any_bit, give = 0x20, 0x15, 0x45, 0x06
    allow, kill, error = 0x7FFF0000, 0x80000000, 0x00050000
    x86_64, not_read_only, new_thread = 0xC000003E, 0o3 | os.O_CREAT | os.O_TRUNC, 0x00010000
    steps = [(load, 0, 0, 4), (equal, 1, 0, x86_64), (give, 0, 0, kill), (load, 0, 0, 0)]
    temporary_file = 0x400000
    for number, argument in ((OPEN, 1), (OPENAT, 2)):
        steps += [
            (equal, 0, 4, number),
            (load, 0, 0, 16 + 8 * argument),
            (is_any_bit, 0, 1, not_read_only | temporary_file),
            (give, 0, 0, error | EPERM),
            (give, 0, 0, allow),
        ]
    steps += [
        (equal, 0, 4, CLONE),
        (load, 0, 0, 16),
        (is_any_bit, 1, 0, new_thread),
        (give, 0, 0, error | EPERM),
        (give, 0, 0, allow),
    ]
    steps += [  # reading a limit has no new one: both halves of the pointer are 0
        (equal, 0, 6, PRLIMIT64),
        (load, 0, 0, 32),
        (equal, 0, 3, 0),
        (load, 0, 0, 36),
        (equal, 0, 1, 0),
        (give, 0, 0, allow),
        (give, 0, 0, error | EPERM),
    ]
    steps += [(equal, 0, 1, CLONE3), (give, 0, 0, error | ENOSYS)]  # glibc then uses clone
    for number in ALLOWED.values():
        steps += [(equal, 0, 1, number), (give, 0, 0, allow)]
    return [*steps, (give, 0, 0, error | EPERM)]
