"""What the tests with real vLLM servers share."""

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
from iwopd_megatron.rollout.servers import Canary, ServerEngine
from iwopd_megatron.rollout.vllm import VllmServer
from iwopd_megatron.services import Keeper, Server, outer_environment

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "recipes/demo_vllm.yaml"
STUDENT = ROOT / "recipes/demo/student"
READY_SECONDS = 400
IDS = [5, 9, 4, 7, 11, 3, 6]  # some prompt


def write_dense(folder: Path) -> Path:
    """A tiny dense model with tied embeddings and the demo's tokenizer."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(3)
    config = Qwen3Config(
        vocab_size=16, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=32, max_position_embeddings=256,
        initializer_range=0.3, tie_word_embeddings=True, eos_token_id=1,
    )  # fmt: skip
    Qwen3ForCausalLM(config).save_pretrained(folder)
    for file in STUDENT.glob("*token*"):
        shutil.copy(file, folder)
    return folder


class Rig:
    """A model folder, a server of it that a keeper looks after, and a loop to talk to it in."""

    def __init__(self, folder: Path, out: Path):
        os.chdir(ROOT)  # the recipe's paths are relative to it
        self.folder, self.out = folder, out
        self.hf, self.eos = read_hf_config(folder), eos_ids(folder)
        self.recipe = load_recipe(
            RECIPE,
            [f"student.hf={folder}", f"teacher.hf={folder}", f"out={out}", "student.parallel={}",
             "rollout.max_response_tokens=100"],
        )  # fmt: skip
        settings, port = self.recipe.rollout.servers, free_port()
        command = [str(settings.python), *server_command(self.recipe, port)]
        env = outer_environment() | VllmServer.environment() | settings.env
        url = f"http://127.0.0.1:{port}"
        self.process = Server("server", command, env, out / "server.log", url)
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
        self.loop.close()
        self.keeper.stop()

    def run(self, coroutine, timeout: float = READY_SECONDS):
        return self.loop.submit(coroutine).result(timeout)

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

    def model(self, weights: dict[str, torch.Tensor]) -> torch.nn.Module:
        """transformers' model with these weights."""
        with tempfile.TemporaryDirectory() as folder:
            shutil.copy(self.folder / "config.json", folder)
            save_file(weights, Path(folder) / "model.safetensors", metadata={"format": "pt"})
            return hf_model(Path(folder), torch.float32)

    def probe(self, weights: dict[str, torch.Tensor]) -> Canary:
        """A prompt that a server with these weights must score as transformers does."""
        expected = logp(self.model(weights), IDS, 1)
        return Canary(IDS, lambda: expected, limit=1e-5)

    def engine(
        self, sync: str, canary: Canary | None = None, is_ours: bool = False
    ) -> ServerEngine:
        """The project's engine on this server, in this process as a world of one.

        is_ours: it is killed, and started again, when it is lost.
        """
        if not dist.is_initialized():
            os.environ.update(
                RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1",
                MASTER_PORT=str(free_port()),
            )  # fmt: skip
        self.said: list[str] = []
        place = Place(self.server, self.process.kill if is_ours else None)
        pool = Pool([place], 64, self.eos, self.said.append)
        targets = Targets(self.loop, pool.lose)
        push = {
            "disk": lambda: FolderPush(targets, self.out / "weights", self.folder),
            "tensor": lambda: RequestPush(targets),
            "distributed": lambda: BroadcastPush(targets, "127.0.0.1", timedelta(seconds=60)),
        }[sync]()
        pool.catch_up = push.catch_up
        return ServerEngine(initialise(Layout()), pool, push, self.loop, 1, canary)


def prompts(count: int, longest: int = 12) -> list[Prompt]:
    """Ragged prompts over the demo's vocabulary, without its special ids."""
    generator = torch.Generator().manual_seed(0)
    lengths = [1 + i % longest for i in range(count)]
    return [
        Prompt(i, torch.randint(4, 16, (n,), generator=generator).tolist())
        for i, n in enumerate(lengths)
    ]


@torch.no_grad()
def logp(model: torch.nn.Module, ids: list[int], first: int, temperature: float = 1.0):
    """Log-probs of ids[first:] by transformers, over the whole vocabulary."""
    logits = model(torch.tensor([ids])).logits[0, first - 1 : -1].float() / temperature
    return logits.log_softmax(-1).gather(-1, torch.tensor(ids[first:])[:, None])[:, 0].tolist()


def largest(a: list[float], b: list[float]) -> float:
    return max(abs(x - y) for x, y in zip(a, b, strict=True))
