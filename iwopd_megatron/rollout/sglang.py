"""A rollout server of SGLang (0.5.23): what rollouts need of its HTTP API.

Traps it keeps callers from: an id outside the vocabulary kills the server, so does a weight of
a wrong shape; an unknown weight is dropped silently; a request that names no weight version
leaves the old label. Output log-probs are at the sampling temperature, over the whole vocabulary.
"""

from __future__ import annotations

import asyncio
import base64
import time
import uuid
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy

from iwopd_megatron.config.recipe import Recipe
from iwopd_megatron.errors import UserError
from iwopd_megatron.rollout.engine import Sampling
from iwopd_megatron.rollout.proof import SglangFingerprints, hashes_by_rank
from iwopd_megatron.rollout.server import (
    ALIVE_SECONDS,
    Completion,
    HttpServer,
    NamedTensors,
    ServerLost,
    ServerRefused,
    header,
)
from iwopd_megatron.rollout.tensor_pickle import pickle_tensors
from iwopd_megatron.runtime.device import has_gpu


class SglangServer(HttpServer):
    """A `RolloutServer`, whose docstrings hold here, that speaks to one SGLang server."""

    module = ("-m", "sglang.launch_server")
    alive_path = "/model_info"

    @staticmethod
    def environment() -> dict[str, str]:
        """Return what a server that iwopd starts needs beside the caller's environment."""
        # on CPUs, too, Qwen2-MoE's shared expert is scaled by a Triton kernel
        cpu = {"SGLANG_USE_CPU_ENGINE": "1", "TRITON_INTERPRET": "1"}
        return {"HF_HUB_OFFLINE": "1"} | ({} if has_gpu() else cpu)

    @staticmethod
    def options(recipe: Recipe, port: int, host: str) -> dict[str, Any]:
        """Return a server's command-line options; it shares no prefix between prompts."""
        rollout, student = recipe.rollout, recipe.student
        longest = rollout.max_prompt_tokens + rollout.max_response_tokens
        options = {
            "model-path": student.hf,
            "load-format": "auto" if student.random_init is None else "dummy",
            "dtype": {"fp32": "float32", "bf16": "bfloat16"}[student.dtype],
            "tp-size": rollout.servers.tp,
            "context-length": longest,
            "host": host,
            "port": port,
            "disable-radix-cache": True,
            "enable-return-routed-experts": rollout.routing_replay,
            "disable-shared-experts-fusion": True,  # else it has no tensors of its own on GPUs
        }
        if has_gpu():
            return options | {"mem-fraction-static": rollout.servers.gpu_memory_fraction}
        return options | {
            "device": "cpu",
            "attention-backend": "torch_native",
            "max-total-tokens": min(rollout.servers.max_running * longest, 65536),
            "sleep-on-idle": True,
        }

    async def wait_ready(self) -> None:
        end = time.monotonic() + self.ready_timeout
        while True:
            try:
                await self._get("/health")
                info = await self._get("/server_info")
                self.tp = int(info.get("tp_size", 1))
                self._check(info)
                return
            except (ServerLost, ServerRefused) as error:
                if time.monotonic() > end:
                    raise ServerLost(f"not ready in {self.ready_timeout:.0f} s: {error}") from None
            await asyncio.sleep(0.5)

    async def describe(self) -> dict[str, Any]:
        return await self._get("/model_info")

    def _check(self, info: dict[str, Any]) -> None:
        if self.pause_mode == "in_place" and not info.get("disable_radix_cache"):
            raise UserError(
                f"{self.url} keeps prefixes of old weights when rollout.pause=in_place; "
                "start it with --disable-radix-cache, or set rollout.pause=retract."
            )
        is_separate = info.get("disable_shared_experts_fusion")
        if self.hf.shared_expert_intermediate_size and not is_separate:
            flag = "--disable-shared-experts-fusion"
            raise UserError(f"{self.url} may fuse experts' weights; start it with {flag}.")

    async def generate(self, ids: list[int], sampling: Sampling) -> Completion:
        """Continue one prompt; a request that nobody waits for any more is aborted."""
        request = uuid.uuid4().hex
        try:
            reply = await self._post(
                "/generate",
                self.timeout,
                rid=request,
                input_ids=self._checked(ids),
                sampling_params={
                    "max_new_tokens": sampling.max_tokens,
                    "temperature": sampling.temperature,
                    "top_p": sampling.top_p,
                    "stop_token_ids": self.eos_ids,
                },
                return_logprob=True,
                return_routed_experts=sampling.with_experts,
            )
        except (ServerLost, asyncio.CancelledError):
            await self._abort(request)
            raise
        answer = self._completion(reply)
        if not sampling.with_experts or answer.finish == "abort":  # the last part has those of all
            return answer
        encoded = reply["meta_info"].get("routed_experts")
        if encoded is None:
            raise UserError(
                f"{self.url} returns no routed experts; "
                "start it with --enable-return-routed-experts, or set rollout.routing_replay=false."
            )
        flat = numpy.frombuffer(base64.b64decode(encoded), dtype=numpy.int32)
        return replace(answer, experts=self._experts(flat, len(ids) + len(answer.ids) - 1))

    async def _abort(self, request: str) -> None:
        """Tell the server to stop working on what nobody waits for."""
        try:
            await asyncio.wait_for(self._post("/abort_request", 2.0, rid=request), 2.0)
        except (ServerLost, ServerRefused, TimeoutError):
            pass

    def _completion(self, reply: dict[str, Any]) -> Completion:
        try:
            ids, meta = list(reply["output_ids"]), reply["meta_info"]
            entries = meta["output_token_logprobs"]
            finish = meta["finish_reason"]["type"]
            spans = meta.get("weight_versions")
            whole = [{"version": meta["weight_version"], "start": 0, "end": len(ids)}]
            versions = [
                str(s["version"]) for s in spans or whole for _ in range(s["start"], s["end"])
            ]
        except (KeyError, TypeError) as error:
            raise ServerLost(f"{self.url}: an answer lacks {error}") from None
        if [entry[1] for entry in entries] != ids or len(versions) != len(ids):
            raise ServerLost(f"{self.url}: an answer's log-probs are not those of its tokens")
        return Completion(ids, [entry[0] for entry in entries], finish, versions)

    async def prompt_logps(self, ids: list[int]) -> list[float]:
        reply = await self._post(
            "/generate",
            input_ids=self._checked(ids),
            sampling_params={"max_new_tokens": 0, "temperature": 1.0},
            return_logprob=True,
            logprob_start_len=0,
        )
        entries = reply["meta_info"]["input_token_logprobs"]
        echoed, last = [entry[1] for entry in entries], self.hf.vocab_size - 1
        if len(echoed) != len(ids) or any(
            theirs != ours and (theirs, ours) != (0, last)  # 0.5.23 echoes the last id as 0
            for theirs, ours in zip(echoed, ids, strict=True)
        ):
            raise ServerLost(f"{self.url}: scored other tokens than it was given")
        return [entry[0] for entry in entries[1:]]

    async def pause(self) -> None:
        await self._post("/pause_generation", mode=self.pause_mode)

    async def resume(self) -> None:
        await self._post("/continue_generation")

    async def load_folder(self, folder: str, version: int) -> None:
        await self._post(
            "/update_weights_from_disk",
            model_path=str(Path(folder).absolute()),
            weight_version=str(version),
            flush_cache=self.pause_mode != "in_place",
        )

    async def begin_update(self) -> None:
        try:
            await self._post("/begin_weight_update")
        except ServerRefused as error:
            if " 404: " in str(error):  # versions before 0.5.23 have no such call
                return
            await self._post("/end_weight_update")  # an update before this one was cut
            await self._post("/begin_weight_update")

    async def send(self, tensors: NamedTensors) -> None:
        parts = [(name, tensor.cpu()) for name, tensor in tensors]
        encoded = base64.b64encode(pickle_tensors(parts)).decode()
        await self._post(
            "/update_weights_from_tensor",
            serialized_named_tensors=[encoded] * self.tp,
            flush_cache=False,
        )

    async def join_group(
        self, address: str, port: int, first: int, world: int, group: str, backend: str
    ) -> None:
        await self._post(
            "/init_weights_update_group",
            master_address=address,
            master_port=port,
            rank_offset=first,
            world_size=world,
            group_name=group,
            backend=backend,
        )

    async def receive(self, tensors: NamedTensors, group: str) -> None:
        await self._post(
            "/update_weights_from_distributed",
            **header(tensors),
            group_name=group,
            load_format="flattened_bucket",
            flush_cache=False,
        )

    async def leave_group(self, group: str) -> None:
        await self._post("/destroy_weights_update_group", ALIVE_SECONDS, group_name=group)

    async def end_update(self, version: int) -> None:
        try:
            await self._post("/end_weight_update")
        except ServerRefused as error:
            if " 404: " not in str(error):
                raise
        await self._post(
            "/update_weight_version", new_version=str(version), abort_all_requests=False
        )
        if self.pause_mode != "in_place":  # refused while requests keep their cache
            await self._post("/flush_cache")

    def fingerprints(self) -> SglangFingerprints:
        return SglangFingerprints(self.hf, self.tp)

    async def checksums(self) -> list[dict[str, str]]:
        return hashes_by_rank(await self._post("/weights_checker", action="checksum"))
