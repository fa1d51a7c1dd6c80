"""Scoring servers for tests: real worlds of forked ranks, and a proxy that spoils their answers."""

import contextlib
import json
import os
import signal
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx

from iwopd_megatron.config.models import Layout, Service, Teacher
from iwopd_megatron.runtime.local_world import start_local
from iwopd_megatron.runtime.services import free_port
from iwopd_megatron.teacher.service import serve

ROOT = Path(__file__).parent.parent
TEACHER = ROOT / "recipes/demo/teacher"  # vocabulary of 16, sequences of at most 128


class Served:
    """A running service: its URL and the ids of its ranks."""

    def __init__(self, url, context):
        self.url, self.context, self.pids = url, context, context.pids()

    def get(self, path):
        return httpx.get(self.url + path, trust_env=False, timeout=30)

    def generate(self, body, timeout=30):
        content = body if isinstance(body, bytes) else json.dumps(body)
        return httpx.post(f"{self.url}/generate", content=content, trust_env=False, timeout=timeout)

    def signal(self, number):
        for pid in self.pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def stop(self, limit=60):
        """SIGTERM; raises unless every rank then exits with 0."""
        self.signal(signal.SIGTERM)
        end = time.monotonic() + limit
        while not self.context.join(timeout=1):
            if time.monotonic() > end:
                self.signal(signal.SIGKILL)
                raise TimeoutError("the service did not end after SIGTERM")


@contextlib.contextmanager
def served(layout=None, folder=TEACHER, **settings):
    """A service of forked ranks; it must drain at the end unless it was killed."""
    port = free_port()
    service = Service(parallel=Layout(**layout or {}), port=port, **settings)
    context = start_local(service.world, serve, (Teacher(hf=folder), service))
    running = Served(f"http://127.0.0.1:{port}", context)
    try:
        wait_until(lambda: _health(running) == 200, 120)
        yield running
        running.stop()
    finally:
        running.signal(signal.SIGKILL)


def _health(running):
    running.context.join(timeout=0)  # raises what a rank died of
    with contextlib.suppress(httpx.TransportError):
        return running.get("/health").status_code


def wait_until(condition, limit=60.0):
    end = time.monotonic() + limit
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError
        time.sleep(0.02)


@contextlib.contextmanager
def spoiled(url, spoil):
    """A proxy of `url`. `spoil(n, answer)` of the n-th /generate gives another (status, bytes), or
    (200, None) to cut the answer in its middle.
    """
    count = iter(range(10**9))

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self):
            answer = httpx.get(url + self.path, trust_env=False)
            self._send(answer.status_code, answer.content, answer.content)

        def do_POST(self):
            body = self.rfile.read(int(self.headers["content-length"]))
            answer = httpx.post(url + self.path, content=body, trust_env=False, timeout=30)
            status, content = spoil(next(count), answer.content)
            self._send(status, answer.content if content is None else content, content)

        def _send(self, status, whole, content):
            self.send_response(status)
            self.send_header("content-length", str(len(whole)))
            if status == 503:
                self.send_header("retry-after", "1")
            self.end_headers()
            self.wfile.write(whole[: len(whole) // 2] if content is None else whole)
            self.close_connection = content is None

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
