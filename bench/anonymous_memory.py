"""Seconds and peak anonymous memory of a piece of work in this process."""

import threading
import time
from collections.abc import Callable
from pathlib import Path


def anonymous_mb() -> float:
    """RssAnon of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("RssAnon")).split()[1]) / 1024


def watched(work: Callable[[], object], every: float = 0.005) -> tuple[float, float]:
    """Seconds, and peak MB of anonymous memory above that before, looked at every `every` s."""
    before, peak, done = anonymous_mb(), 0.0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(every):
            peak = max(peak, anonymous_mb() - before)

    thread = threading.Thread(target=watch)
    thread.start()
    start = time.perf_counter()
    work()
    seconds = time.perf_counter() - start
    done.set()
    thread.join()
    return seconds, peak
