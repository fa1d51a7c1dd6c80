"""What tests with a real engine's servers share, whichever engine it is."""

import asyncio
import os
import shutil
import tempfile
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from iwopd_megatron.config.load import load_recipe
from iwopd_megatron.config.models import Layout
from iwopd_megatron.hf.config import read_hf_config
from iwopd_megatron.hf.families import FAMILIES
from iwopd_megatron.hf.folder import eos_ids
from iwopd_megatron.parity.hf_reference import hf_model
from iwopd_megatron.parity.rehearse import write_model
from iwopd_megatron.rollout.broadcast import BroadcastPush
from iwopd_megatron.rollout.controller import ServerController
from iwopd_megatron.rollout.engine import Prompt, Sampling
from iwopd_megatron.rollout.make import server_command, server_environment
from iwopd_megatron.rollout.pool import Replica, ServerPool
from iwopd_megatron.rollout.push import FolderPush, Push, RequestPush
from iwopd_megatron.rollout.servers import Canary, ServerEngine
from iwopd_megatron.runtime.keeper import Keeper
from iwopd_megatron.runtime.main_only import main_only
from iwopd_megatron.runtime.parallel import initialise
from iwopd_megatron.runtime.services import Server, free_port

ROOT = Path(__file__).parents[1]
STUDENT = ROOT / "recipes/demo/student"


def copy_tokenizer(source: Path, folder: Path) -> None:
    for file in source.iterdir():
        if "token" in file.name or file.suffix == ".jinja":
            shutil.copy(file, folder)


def write_dense(folder: Path, head_dim: int) -> Path:
    """A tiny dense model with tied embeddings and the demo's tokenizer."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(3)
    config = Qwen3Config(
        vocab_size=16,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=head_dim,
        max_position_embeddings=256,
        initializer_range=0.3,
        tie_word_embeddings=True,
        eos_token_id=1,
    )
    Qwen3ForCausalLM(config).save_pretrained(folder)
    copy_tokenizer(STUDENT, folder)
    return folder


def write_family(folder: Path, model_type: str) -> Path:
    """A family's sample with the demo's vocabulary and tokenizer, answers that end now and then."""
    sample = dict(FAMILIES[model_type].sample)
    is_tied = not FAMILIES[model_type].has_experts  # not every engine ties others
    own = {"model_type": model_type, "vocab_size": 16, "tie_word_embeddings": is_tied}
    heads = sample["hidden_size"] // 32  # of the smallest size that vLLM has on a CPU
    own |= {"num_attention_heads": heads, "num_key_value_heads": heads // 2, "head_dim": 32}
    write_model(folder, sample | own | {"pad_token_id": None, "eos_token_id": 1})
    copy_tokenizer(STUDENT, folder)
    return folder


def check_family_served(rig, engine, model, version: int) -> None:
    """Prompts are scored, and answers' tokens, as by transformers' model; answers have the version.

    rig: with `server` and `run`; engine: the project's, on that server.
    """
    for prompt in prompts(6):
        ids = prompt.ids + [5, 9, 4, 7]
        assert largest(rig.run(rig.server.prompt_logps(ids)), hf_logp(model, ids, 1)) < 1e-4
    for sample in engine.generate(prompts(6), Sampling(20)):
        ids = sample.prompt_ids + sample.response_ids
        expected = hf_logp(model, ids, len(sample.prompt_ids))
        assert largest(expected, sample.rollout_logp) < 1e-4
        assert sample.weight_version == version


async def overtaken(ask, push) -> list[tuple]:
    """(prompt, answer) of eight who ask all the time while new weights come.

    ask: coroutine function of a prompt and a number of tokens. push: coroutine function of a
    version, 0 at first; the next ones come until they overtook an answer, which an engine so fast
    may have written whole before it hears of them.
    """
    answers, is_done = [], asyncio.Event()

    async def keep_asking(prompt: Prompt, tokens: int) -> None:
        while not is_done.is_set():
            answers.append((prompt, await ask(prompt, tokens)))

    await push(0)
    asked = zip(prompts(8), range(30, 110, 10), strict=True)
    asking = [asyncio.create_task(keep_asking(*one)) for one in asked]
    for version in range(1, 31):
        seen = len(answers)
        while len(answers) < seen + 8:
            await asyncio.sleep(0.01)
        await push(version)
        if any(len(set(answer.versions)) > 1 for _, answer in answers):
            break
    is_done.set()
    await asyncio.gather(*asking)
    assert any(len(set(answer.versions)) > 1 for _, answer in answers), "nothing was in flight"
    return answers


class ServedModel:
    """A model folder, and what becomes of it: processes, other weights, the project's engine."""

    def __init__(self, recipe: Path, folder: Path, out: Path, *overrides: str):
        os.chdir(ROOT)  # the recipe's paths are relative to it
        self.folder, self.out = folder, out
        self.hf, self.eos = read_hf_config(folder), eos_ids(folder)
        own = [f"student.hf={folder}", f"teacher.hf={folder}", f"out={out}", "student.parallel={}"]
        own += ["rollout.max_response_tokens=100", *overrides]
        self.recipe = load_recipe(recipe, own)
        self.push: Push | None = None  # of the last engine

    def new_process(self, number: int = 0) -> Server:
        """A server of the model, not yet started."""
        port = free_port()
        python = str(self.recipe.rollout.servers.python)
        command, env = [python, *server_command(self.recipe, port)], server_environment(self.recipe)
        log, url = self.out / f"server-{number}.log", f"http://127.0.0.1:{port}"
        return Server(f"server {number}", command, env, log, url)

    def weights(self, seed: int | None = None) -> dict[str, torch.Tensor]:
        """The folder's tensors; with a seed, every one of them moved a little."""
        tensors = load_file(self.folder / "model.safetensors")
        if self.hf.tie_word_embeddings:
            tensors.pop("lm_head.weight", None)
        if seed is None:
            return tensors
        generator = torch.Generator().manual_seed(seed)
        return {
            name: tensor + 0.02 * torch.randn(tensor.shape, generator=generator)
            for name, tensor in tensors.items()
        }

    def model(self, weights: dict[str, torch.Tensor] | None = None) -> torch.nn.Module:
        """transformers' model with these weights; default: the folder's."""
        if weights is None:
            return hf_model(self.folder, torch.float32)
        with tempfile.TemporaryDirectory() as folder:
            shutil.copy(self.folder / "config.json", folder)
            save_file(weights, Path(folder) / "model.safetensors", metadata={"format": "pt"})
            return hf_model(Path(folder), torch.float32)

    def assemble(
        self,
        loop,
        replicas: list[Replica],
        sync: str,
        say,
        max_running=64,
        canary: Canary | None = None,
    ) -> ServerEngine:
        """The project's engine on these servers, in this process as a world of one.

        `controller` is its rank 0's side.
        """
        if not dist.is_initialized():
            os.environ.update(
                RANK="0",
                LOCAL_RANK="0",
                WORLD_SIZE="1",
                MASTER_ADDR="127.0.0.1",
                MASTER_PORT=str(free_port()),
            )
        if self.push is not None:
            self.push.close()
        push = {
            "disk": lambda: FolderPush(self.out / "weights", self.folder),
            "tensor": lambda: RequestPush(),
            "distributed": lambda: BroadcastPush("127.0.0.1", timedelta(seconds=60)),
        }[sync]()
        pool = ServerPool(replicas, max_running, self.eos, say, catch_up=push.catch_up)
        self.push, keeper = push, Keeper([], 1)  # the servers have a keeper of the tests
        self.controller = ServerController(loop, pool, push, keeper)
        return ServerEngine(main_only(initialise(Layout()), lambda: self.controller), 1, canary)


def spoil_last_tensor(push: Push) -> None:
    """Servers get another last tensor of a bucket than the one that is believed sent."""
    send = push.send

    def spoil(tensors):
        (name, tensor), *rest = reversed(tensors)
        send([*rest, (name, tensor + 1e-3)])

    push.send = spoil


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


def hf_logp_of_versions(models: list, prompt: Prompt, answer) -> list[float]:
    """Each token's log-prob by the model that wrote it: models[0] of even versions, [1] of odd."""
    ids, first = prompt.ids + answer.ids, len(prompt.ids)
    logp = [hf_logp(model, ids, first) for model in models]
    return [logp[int(version) % 2][i] for i, version in enumerate(answer.versions)]


def largest(a: list[float], b: list[float]) -> float:
    return max(abs(x - y) for x, y in zip(a, b, strict=True))
