"""Ctrl-C and SIGTERM ask a run to stop: it saves after its round and exits with `EXIT_STOPPED`."""

import signal

EXIT_STOPPED = 75  # EX_TEMPFAIL: saved, run again with --resume
_requested = False


def watch_signals() -> None:
    """From now on the first SIGINT or SIGTERM only sets a flag; a second one ends the process."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _request)


def _request(number: int, frame: object) -> None:
    global _requested
    _requested = True
    signal.signal(number, signal.SIG_DFL)


def stop_requested() -> bool:
    """Whether this process was asked to stop."""
    return _requested
