"""Keeps the servers of a run alive: starts them, and starts those again that die or hang.

A thread, not a process manager: servers must die with the process that started them (services.py),
and a restart is told to the run (`say`).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence

from iwopd_megatron.errors import ServiceError
from iwopd_megatron.runtime.services import Server, is_answering


class Keeper:
    """A thread that starts servers, restarts those that die or hang, and stops them at the end.

    A server that was never ready is not restarted, nor one that was restarted `max_restarts` times:
    then `failure` says why.
    """

    def __init__(
        self,
        servers: Sequence[Server],
        start_timeout: float,
        max_restarts: int = 3,
        hang_timeout: float = 60.0,
        say: Callable[[str], None] = print,
    ):
        """start_timeout: seconds until ready; hang_timeout: seconds without an answer."""
        self.watched = [WatchedServer(server) for server in servers]
        self.start_timeout, self.hang_timeout = start_timeout, hang_timeout
        self.max_restarts, self.say = max_restarts, say
        self.failure: ServiceError | None = None
        self._stopping = threading.Event()
        # Servers die with the thread that starts them, so one that lasts starts them all.
        self._thread = threading.Thread(target=self._keep, name="keeper", daemon=True)

    def start(self) -> None:
        """Start all servers; return before they are ready."""
        self._thread.start()

    def is_ready(self) -> bool:
        """Return whether all were ready at some time; ServiceError if one will not be."""
        if self.failure is not None:
            raise self.failure
        return all(one.was_ready for one in self.watched)

    def wait_ready(self) -> None:
        """Return when all were ready; ServiceError if one will not be."""
        while not self.is_ready():
            time.sleep(0.05)

    def stop(self) -> None:
        """Stop all servers and the thread; a no-op when repeated."""
        self._stopping.set()
        if self._thread.ident is not None:
            self._thread.join()

    def _keep(self) -> None:
        for one in self.watched:
            one.server.start()
        while not self._stopping.wait(0.2):
            for one in self.watched if self.failure is None else []:
                trouble = one.trouble(self.start_timeout, self.hang_timeout)
                if trouble is not None:
                    self._restart(one, trouble)
        for one in self.watched:
            one.server.stop()

    def _restart(self, one: WatchedServer, trouble: str) -> None:
        what = f"{one.server.name} {trouble}"
        if not one.was_ready or one.restarts == self.max_restarts:
            count = f" after {one.restarts} restarts" if one.restarts else ""
            log = one.server.log
            self.failure = ServiceError(
                f"{what}{count}; the last line of {log} is: {one.server.last_line()}"
            )
            return
        one.restarts += 1
        self.say(f"{what}; restart {one.restarts} of {self.max_restarts}.")
        one.server.restart()
        one.is_up, one.started = False, time.monotonic()


class WatchedServer:
    """A server, how often its keeper restarted it, and when it last answered."""

    def __init__(self, server: Server):
        self.server = server
        self.restarts, self.was_ready, self.is_up = 0, False, False
        self.started = self.heard = time.monotonic()

    def trouble(self, start_timeout: float, hang_timeout: float) -> str | None:
        """Ask the server by HTTP; return why it must be restarted, None if it need not."""
        if not self.server.is_running:
            return f"ended with exit code {self.server.exit_code}"
        now = time.monotonic()
        if self.is_up:
            self.heard = now if is_answering(self.server.url) else self.heard
        elif self.server.health() == 200:
            self.is_up = self.was_ready = True
            self.heard = now
        if not self.is_up and now - self.started > start_timeout:
            return f"was not ready within {start_timeout:g} seconds"
        if self.is_up and now - self.heard > hang_timeout:
            return f"has not answered for {hang_timeout:g} seconds"
        return None
