"""What the tests with real SGLang servers share."""

from pathlib import Path

import httpx
from served_models import ROOT, ServedModel

from iwopd_megatron.rollout.pool import Replica
from iwopd_megatron.rollout.servers import ServerEngine
from iwopd_megatron.rollout.sglang import SglangServer
from iwopd_megatron.runtime.background import Background
from iwopd_megatron.runtime.keeper import Keeper

RECIPE = ROOT / "recipes/demo_sglang.yaml"


class Rig(ServedModel):
    """A model folder, servers of it that a keeper looks after, and a loop to talk to them in."""

    def __init__(self, folder: Path, out: Path, servers: int = 1, *overrides: str):
        super().__init__(RECIPE, folder, out, *overrides)
        self.processes = [self.new_process(number) for number in range(servers)]
        self.keeper = Keeper(self.processes, 400, max_restarts=100, hang_timeout=600)

    def __enter__(self):
        self.keeper.start()
        self.connect()
        for server in self.servers:
            self.run(server.wait_ready())
        return self

    def __exit__(self, *_):
        if self.push is not None:
            self.push.close()
        self.loop.close()
        self.keeper.stop()

    def connect(self) -> None:
        """A new loop and clients; a forked process needs its own."""
        self.loop, self.push = Background(), None
        self.http = httpx.AsyncClient(limits=httpx.Limits(max_connections=None), trust_env=False)
        self.servers = [
            SglangServer(process.url, self.http, self.hf, self.eos, ready_timeout=400)
            for process in self.processes
        ]

    def run(self, coroutine, timeout: float = 400):
        return self.loop.submit(coroutine).result(timeout)

    @property
    def server(self) -> SglangServer:
        return self.servers[0]

    def engine(self, sync: str, say=print, max_running: int = 64) -> ServerEngine:
        """The project's engine on these servers, which are ours to kill."""
        pairs = zip(self.servers, self.processes, strict=True)
        replicas = [Replica(server, process, process.process) for server, process in pairs]
        return self.assemble(self.loop, replicas, sync, say, max_running)
