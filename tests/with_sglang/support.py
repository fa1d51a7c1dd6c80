"""What the tests with real SGLang servers share."""

import os
import shutil
import tempfile
from datetime import timedelta
from pathlib import Path

import httpx
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from iwopd_megatron.background import Background
from iwopd_megatron.config_models import Layout
from iwopd_megatron.hf_reference import hf_model
from iwopd_megatron.parallel import free_port, initialise
from iwopd_megatron.preflight import eos_ids, read_hf_config
from iwopd_megatron.recipe import load_recipe
from iwopd_megatron.rollout import Prompt
from iwopd_megatron.rollout.make import server_command
from iwopd_megatron.rollout.pool import Place, Pool
from iwopd_megatron.rollout.push import BroadcastPush, FolderPush, RequestPush, Targets
from iwopd_megatron.rollout.servers import ServerEngine
from iwopd_megatron.rollout.sglang import SglangServer
from iwopd_megatron.services import Keeper, Server, outer_environment

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "recipes/demo_sglang.yaml"


def copy_tokenizer(source: Path, folder: Path) -> None:
    for file in source.iterdir():
        if "token" in file.name or file.suffix == ".jinja":
            shutil.copy(file, folder)


def recipe_for(folder: Path, out: Path, *overrides: str):
    os.chdir(ROOT)  # the recipe's paths are relative to it
    paths = [f"student.hf={folder}", f"teacher.hf={folder}", f"out={out}"]
    layout = ["student.parallel={}", "rollout.max_response_tokens=100"]
    return load_recipe(RECIPE, [*paths, *layout, *overrides])


class Rig:
    """A model folder, servers of it that a keeper looks after, and a loop to talk to them in."""

    def __init__(self, folder: Path, out: Path, servers: int = 1, *overrides: str):
        self.folder, self.out = folder, out
        self.hf, self.eos = read_hf_config(folder), eos_ids(folder)
        self.recipe = recipe_for(folder, out, *overrides)
        settings = self.recipe.rollout.servers
        env = outer_environment() | SglangServer.environment() | settings.env
        self.processes = []
        for number in range(servers):
            port = free_port()
            command = [str(settings.python), *server_command(self.recipe, port)]
            log, url = out / f"server-{number}.log", f"http://127.0.0.1:{port}"
            self.processes.append(Server(f"server {number}", command, env, log, url))
        self.keeper = Keeper(self.processes, 400, max_restarts=100, hang_timeout=600)

    def __enter__(self):
        self.keeper.start()
        self.connect()
        for server in self.servers:
            self.run(server.wait_ready())
        return self

    def __exit__(self, *_):
        self.loop.close()
        self.keeper.stop()

    def connect(self) -> None:
        """A new loop and clients; a forked process needs its own."""
        self.loop = Background()
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

    def weights(self, seed: int | None = None) -> dict[str, torch.Tensor]:
        """The folder's tensors; with a seed, every one of them moved a little."""
        tensors = load_file(self.folder / "model.safetensors")
        if self.hf["tie_word_embeddings"]:
            tensors.pop("lm_head.weight", None)
        if seed is None:
            return tensors
        generator = torch.Generator().manual_seed(seed)
        return {
            name: tensor + 0.02 * torch.randn(tensor.shape, generator=generator)
            for name, tensor in tensors.items()
        }

    def model(self, weights: dict[str, torch.Tensor] | None = None):
        """transformers' model with these weights."""
        if weights is None:
            return hf_model(self.folder, torch.float32)
        with tempfile.TemporaryDirectory() as folder:
            shutil.copy(self.folder / "config.json", folder)
            save_file(weights, Path(folder) / "model.safetensors", metadata={"format": "pt"})
            return hf_model(Path(folder), torch.float32)

    def engine(self, sync: str, say=print, max_running: int = 64) -> ServerEngine:
        """The project's engine on these servers, in this process as a world of one."""
        if not dist.is_initialized():
            os.environ.update(
                RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1",
                MASTER_PORT=str(free_port()),
            )  # fmt: skip
        parallel = initialise(Layout())
        places = [Place(server) for server in self.servers]
        for place, process in zip(places, self.processes, strict=True):
            place.kill = process.kill
        pool = Pool(places, max_running, self.eos, say)
        targets = Targets(self.loop, pool.lose)
        push = {
            "disk": lambda: FolderPush(targets, self.out / "weights", self.folder),
            "tensor": lambda: RequestPush(targets),
            "distributed": lambda: BroadcastPush(targets, "127.0.0.1", timedelta(seconds=60)),
        }[sync]()
        pool.catch_up = push.catch_up
        return ServerEngine(parallel, pool, push, self.loop, verify_every=1)


def prompts(count: int, longest: int = 12) -> list[Prompt]:
    """Ragged prompts over the demo's vocabulary, without its special ids."""
    generator = torch.Generator().manual_seed(0)
    lengths = [1 + i % longest for i in range(count)]
    return [
        Prompt(i, torch.randint(4, 16, (n,), generator=generator).tolist())
        for i, n in enumerate(lengths)
    ]


@torch.no_grad()
def hf_logp(model, ids: list[int], first: int, temperature: float = 1.0) -> list[float]:
    """Log-probs of ids[first:] by transformers, over the whole vocabulary."""
    logits = model(torch.tensor([ids])).logits[0, first - 1 : -1].float() / temperature
    return logits.log_softmax(-1).gather(-1, torch.tensor(ids[first:])[:, None])[:, 0].tolist()


def largest(a: list[float], b: list[float]) -> float:
    return max(abs(x - y) for x, y in zip(a, b, strict=True))
