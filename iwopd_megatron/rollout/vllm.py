"""A rollout server of vLLM (0.32): what rollouts need of its HTTP API.

Ids go in and come out; new weights go through `vllm_worker.py`, which vLLM loads into its workers.
Traps it keeps callers from: log-probs before the temperature (vLLM's default), sampling settings
of the model's generation_config.json, prefixes cached under old weights, answers of a server that
was restarted with old weights: its weight version is "default" until it is told another.
"""

from __future__ import annotations

import asyncio
import base64
import time
from pathlib import Path
from typing import Any

from safetensors.torch import save

from iwopd_megatron.config.recipe import Recipe
from iwopd_megatron.errors import UserError
from iwopd_megatron.hf.config import HfConfig, read_hf_config
from iwopd_megatron.rollout.engine import Sampling
from iwopd_megatron.rollout.proof import NameFingerprints
from iwopd_megatron.rollout.server import (
    Completion,
    HttpServer,
    NamedTensors,
    ServerLost,
    ServerRefused,
    header,
)
from iwopd_megatron.runtime.device import has_gpu

EXTENSION = "iwopd_megatron.rollout.vllm_worker.WeightUpdates"
UPDATING = "updating"  # the version of what is neither the old weights nor the new


class VllmServer(HttpServer):
    """A `RolloutServer`, whose docstrings hold here, that speaks to one vLLM server.

    The server runs without data parallelism.
    """

    module = ("-m", "vllm.entrypoints.openai.api_server")
    alive_path = "/health"
    prove = False  # whether the server hashes the tensors of the next update

    @staticmethod
    def environment() -> dict[str, str]:
        """Return what a server that iwopd starts needs beside the caller's environment.

        Its Python must find `vllm_worker.py`: in this checkout, or in an installation of its own.
        """
        env = {"VLLM_SERVER_DEV_MODE": "1", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
        root = Path(__file__).parents[2]
        if root.name not in ("site-packages", "dist-packages"):  # those hold another Python's torch
            env["PYTHONPATH"] = str(root)
        if not has_gpu():
            env |= {"TORCH_COMPILE_DISABLE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
        return env

    @staticmethod
    def options(recipe: Recipe, port: int, host: str) -> dict[str, Any]:
        """Return a server's command-line options; it shares no prefix between prompts."""
        rollout, student = recipe.rollout, recipe.student
        hf = read_hf_config(student.hf)
        whole = rollout.max_prompt_tokens + rollout.max_response_tokens
        longest = min(whole + 1, hf.context_length)  # scoring a prompt writes one token
        options = {
            "model": student.hf,
            "load-format": "auto" if student.random_init is None else "dummy",
            "dtype": {"fp32": "float32", "bf16": "bfloat16"}[student.dtype],
            "tensor-parallel-size": rollout.servers.tp,
            "max-model-len": longest,
            "max-num-seqs": rollout.servers.max_running,
            "host": host,
            "port": port,
            "enable-scale-out": True,  # ids in, ids out
            "skip-tokenizer-init": True,
            "generation-config": "vllm",
            "logprobs-mode": "processed_logprobs",
            "no-enable-prefix-caching": True,
            "worker-extension-cls": EXTENSION,
            "disable-uvicorn-access-log": True,
        }
        if has_gpu():
            return options | {"gpu-memory-utilization": rollout.servers.gpu_memory_fraction}
        tokens = min(rollout.servers.max_running * longest, 65536)
        return options | {
            "enforce-eager": True,
            "gpu-memory-utilization": 0.3,  # vLLM sees about half of the machine's memory
            "kv-cache-memory-bytes": max(64 * 2**20, tokens * _kv_bytes(hf)),
        }

    async def _on_workers(self, method: str, **arguments: Any) -> list[Any]:
        """Call a method of `vllm_worker.WeightUpdates` on all workers; return what each returns."""
        reply = await self._post("/collective_rpc", method=f"iwopd_{method}", kwargs=arguments)
        return reply["results"]

    async def describe(self) -> dict[str, Any]:
        models = await self._get("/v1/models")
        return {"model_path": models["data"][0].get("root")}

    async def wait_ready(self) -> None:
        """Return when it can generate; UserError if it was started with unsuitable settings."""
        end = time.monotonic() + self.ready_timeout
        while not await self.is_alive():
            if time.monotonic() > end:
                raise ServerLost(f"{self.url} was not ready in {self.ready_timeout:.0f} s")
            await asyncio.sleep(0.5)
        await self._check()

    async def _check(self) -> None:
        try:
            infos = await self._on_workers("info")
        except (ServerLost, ServerRefused) as error:
            if not await self.is_alive():
                raise
            raise UserError(
                f"{self.url} cannot take weights ({error}); start it with "
                f"VLLM_SERVER_DEV_MODE=1 and --worker-extension-cls {EXTENSION}, "
                "and this package on its PYTHONPATH."
            ) from None
        self.tp, info = len(infos), infos[0]
        if info["ranks"] != self.tp:
            raise UserError(f"{self.url} is data-parallel; start a server a replica instead.")
        if info["logprobs_mode"] != "processed_logprobs":
            raise UserError(
                f"{self.url} returns log-probs without the temperature; "
                "start it with --logprobs-mode processed_logprobs."
            )
        if self.pause_mode == "in_place" and info["prefix_caching"]:
            raise UserError(
                f"{self.url} keeps prefixes of old weights when rollout.pause=in_place; "
                "start it with --no-enable-prefix-caching, or set rollout.pause=retract."
            )

    async def generate(self, ids: list[int], sampling: Sampling) -> Completion:
        """Continue one prompt; without log-probs if top_p < 1: vLLM's are of what it leaves."""
        reply = await self._post(
            "/inference/v1/generate",
            self.timeout,
            token_ids=self._checked(ids),
            sampling_params={
                "max_tokens": sampling.max_tokens,
                "temperature": sampling.temperature,
                "top_p": sampling.top_p,
                "seed": sampling.request_seed,
                "stop_token_ids": self.eos_ids,
                "ignore_eos": True,  # the line above names all that end an answer
                "logprobs": 0 if sampling.top_p == 1 else None,  # 0: of the sampled token
                "detokenize": False,
            },
        )
        return self._completion(reply, has_logp=sampling.top_p == 1)

    def _completion(self, reply: dict[str, Any], has_logp: bool) -> Completion:
        try:
            (choice,) = reply["choices"]
            ids, finish = choice["token_ids"], choice["finish_reason"]
            entries = choice["logprobs"]["content"] if has_logp else []
            spans = choice["weight_versions"] or []
            versions = [s["version"] for s in spans for _ in range(s["start"], s["end"])]
        except (KeyError, TypeError) as error:
            raise ServerLost(f"{self.url}: an answer lacks {error}") from None
        if has_logp and [entry["token_id"] for entry in entries] != ids:
            raise ServerLost(f"{self.url}: an answer's log-probs are not those of its tokens")
        if len(versions) != len(ids):
            raise ServerLost(f"{self.url}: an answer's weight versions are not its tokens'")
        return Completion(ids, [entry["logprob"] for entry in entries], finish, versions)

    async def prompt_logps(self, ids: list[int]) -> list[float]:
        reply = await self._post(
            "/inference/v1/generate",
            token_ids=self._checked(ids),
            sampling_params={"max_tokens": 1, "prompt_logprobs": 0, "detokenize": False},
        )
        try:
            entries = reply["prompt_logprobs"][1:]
            return [e[str(i)]["logprob"] for i, e in zip(ids[1:], entries, strict=True)]
        except (KeyError, TypeError, ValueError) as error:
            raise ServerLost(f"{self.url}: a score lacks {error}") from None

    async def pause(self) -> None:
        await self._post("/pause?mode=keep&clear_cache=false")  # `end_update` clears it

    async def resume(self) -> None:
        await self._post("/resume")

    async def load_folder(self, folder: str, version: int) -> None:
        await self.begin_update()
        await self._on_workers("load_folder", folder=str(Path(folder).absolute()))
        await self.end_update(version)

    async def begin_update(self) -> None:
        """Get ready for new weights; the answers' label says meanwhile that they change."""
        await self._post("/update_weight_version", new_version=UPDATING)
        prove, self.prove = self.prove, False
        await self._on_workers("begin", prove=prove)

    async def send(self, tensors: NamedTensors) -> None:
        """Give every worker these tensors, a safetensors file in base64, in the request."""
        whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors}
        await self._on_workers("load_bytes", encoded=base64.b64encode(save(whole)).decode())

    async def join_group(
        self, address: str, port: int, first: int, world: int, group: str, backend: str
    ) -> None:
        where = {"address": address, "port": port, "group": group, "backend": backend}
        await self._on_workers("join", first=first, world=world, **where)

    async def receive(self, tensors: NamedTensors, group: str) -> None:
        """Take these tensors from rank 0's next broadcast."""
        await self._on_workers("receive", **header(tensors))

    async def leave_group(self, group: str) -> None:
        await self._on_workers("leave")

    async def end_update(self, version: int) -> None:
        """End an update: forget cached prefixes, label answers with `version`.

        ServerLost if a weight of the model did not come.
        """
        await self._on_workers("end")
        if self.pause_mode != "in_place":
            await self._post("/reset_prefix_cache?reset_running_requests=true")
        await self._post("/update_weight_version", new_version=str(version))

    def fingerprints(self) -> NameFingerprints:
        """Return what `checksums` is compared with; the server hashes the next update's tensors."""
        self.prove = True
        return NameFingerprints(self.tp)

    async def checksums(self) -> list[dict[str, str]]:
        """Return the hashes of each worker's tensors by Hugging Face name."""
        return await self._on_workers("checksums")


def _kv_bytes(hf: HfConfig) -> int:
    """Return the bytes of one token's keys and values in fp32."""
    cached = hf.kv_down or 2 * hf.num_key_value_heads * hf.head_dim
    return 4 * hf.num_hidden_layers * cached
