"""Ctrl-C and SIGTERM ask a run to stop: it saves after its round, then exits with EXIT_STOPPED."""

import ctypes
import signal
import sys

_requested = False


def watch_signals() -> None:
    """Let the first SIGINT or SIGTERM only set a flag; a second one ends the process."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _request)


def die_with_parent() -> None:
    """Ask the kernel to kill this process when the one that started it dies.

    A rank that outlived a killed launcher would go on writing into the folder of the run that
    resumes. Linux only; elsewhere nothing happens.
    """
    if sys.platform == "linux":
        set_parent_death_signal = 1
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)


def _request(number: int, frame: object) -> None:
    global _requested
    _requested = True
    signal.signal(number, signal.SIG_DFL)


def stop_requested() -> bool:
    """Return whether this process was asked to stop."""
    return _requested
