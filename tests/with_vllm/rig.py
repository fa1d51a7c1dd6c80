"""What the tests with real vLLM servers share."""

from pathlib import Path

import httpx
import torch
from served_models import ROOT, ServedModel, hf_logp

from iwopd_megatron.rollout.pool import Replica
from iwopd_megatron.rollout.servers import Canary, ServerEngine
from iwopd_megatron.rollout.vllm import VllmServer
from iwopd_megatron.runtime.background import Background
from iwopd_megatron.runtime.keeper import Keeper

RECIPE = ROOT / "recipes/demo_vllm.yaml"
READY_SECONDS = 900
IDS = [5, 9, 4, 7, 11, 3, 6]  # some prompt


class Rig(ServedModel):
    """A model folder, a server of it that a keeper looks after, and a loop to talk to it in."""

    def __init__(self, folder: Path, out: Path, *overrides: str):
        super().__init__(RECIPE, folder, out, *overrides)
        self.process = self.new_process()
        self.keeper = Keeper([self.process], READY_SECONDS, hang_timeout=600)
        self.keeper.start()
        self.loop = Background()
        self.http = httpx.AsyncClient(limits=httpx.Limits(max_connections=None), trust_env=False)
        self.server = self.client()

    def client(self, **settings) -> VllmServer:
        return VllmServer(
            self.process.url, self.http, self.hf, self.eos, ready_timeout=READY_SECONDS, **settings
        )

    def stop(self) -> None:
        if self.push is not None:
            self.push.close()
        self.loop.close()
        self.keeper.stop()

    def run(self, coroutine, timeout: float = READY_SECONDS):
        return self.loop.submit(coroutine).result(timeout)

    def probe(self, weights: dict[str, torch.Tensor]) -> Canary:
        """A prompt that a server with these weights must score as transformers does."""
        expected = hf_logp(self.model(weights), IDS, 1)
        return Canary(IDS, lambda: expected, limit=1e-5)

    def engine(
        self, sync: str, canary: Canary | None = None, is_ours: bool = False
    ) -> ServerEngine:
        """The project's engine on this server.

        is_ours: it is killed, and started again, when it is lost.
        """
        self.said: list[str] = []
        replicas = [Replica(self.server, self.process if is_ours else None)]
        return self.assemble(self.loop, replicas, sync, self.said.append, canary=canary)
