"""New weights for a running vLLM (0.32): a class that vLLM mixes into each of its workers.

It is imported by vLLM's own Python (`--worker-extension-cls`), so it needs nothing of this package.
/collective_rpc calls its methods on every worker, whatever the tensor- and pipeline-parallel
layout: each gets whole tensors under Hugging Face names and keeps its part. vLLM loads layer by
layer: a layer's tensors wait until it is whole, so a worker holds one layer twice, not the model,
where tensors come in the model's order.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import load
from torch.distributed import distributed_c10d as c10d
from vllm.config import set_current_vllm_config
from vllm.model_executor.model_loader.reload import (
    finalize_layerwise_reload,
    initialize_layerwise_reload,
)
from vllm.platforms import current_platform

if TYPE_CHECKING:
    from torch.distributed.distributed_c10d import GroupName
    from vllm.config import VllmConfig
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

HEAD = "lm_head.weight"
BROADCAST_TIMEOUT = timedelta(minutes=10)


class WeightUpdates:
    """Methods of a worker for /collective_rpc; what they are given and return is JSON."""

    # The worker's own
    vllm_config: VllmConfig
    rank: int
    device: torch.device
    model_runner: GPUModelRunner
    # There between `iwopd_begin` and `iwopd_end`, from `iwopd_join` to `iwopd_leave`, after an end
    _iwopd_update: _Update
    _iwopd_group: dist.ProcessGroup
    _iwopd_received: dict[str, tuple[str, torch.Tensor]]

    def iwopd_info(self) -> dict[str, Any]:
        """Return what the client must know of the server's settings."""
        config = self.vllm_config
        return {
            "ranks": config.parallel_config.world_size_across_dp,
            "logprobs_mode": config.model_config.logprobs_mode,
            "prefix_caching": bool(config.cache_config.enable_prefix_caching),
        }

    def iwopd_begin(self, prove: bool) -> None:
        """Make room for new weights. prove: hash every tensor, for `iwopd_checksums`."""
        with set_current_vllm_config(self.vllm_config):
            unfinished = getattr(self, "_iwopd_update", None)
            if unfinished is not None:
                unfinished.finish()
            self._iwopd_update = _Update(self, prove)

    def iwopd_load_bytes(self, encoded: str) -> None:
        """Load some tensors: a safetensors file in base64."""
        self._iwopd_load(load(base64.b64decode(encoded)).items())

    def iwopd_load_folder(self, folder: str) -> None:
        """Load all tensors of a Hugging Face folder."""
        self._iwopd_load(_tensors(Path(folder)))

    def iwopd_join(
        self, address: str, port: int, first: int, world: int, group: str, backend: str
    ) -> None:
        """Join a process group, whose rank 0 sends weights, as rank `first` + this worker's."""
        store = dist.TCPStore(address, port, world, False, BROADCAST_TIMEOUT)
        joined, _ = c10d._new_process_group_helper(
            world,
            first + self.rank,
            [],
            c10d.Backend(backend),
            c10d.PrefixStore(group, store),
            group_name=cast("GroupName", group),  # a NewType of str that older torch lacks
            timeout=BROADCAST_TIMEOUT,
        )
        c10d._world.pg_group_ranks[joined] = {i: i for i in range(world)}
        self._iwopd_group = joined

    def iwopd_receive(self, names: list[str], dtypes: list[str], shapes: list[list[int]]) -> None:
        """Load these tensors, end to end as bytes in rank 0's next broadcast."""
        kinds = [getattr(torch, dtype) for dtype in dtypes]
        sizes = [
            kind.itemsize * torch.Size(shape).numel()
            for kind, shape in zip(kinds, shapes, strict=True)
        ]
        flat = torch.empty(sum(sizes), dtype=torch.uint8, device=self.device)
        dist.broadcast(flat, 0, group=self._iwopd_group)
        # A copy each: a view may lie at an offset its dtype does not allow, and keeps all alive.
        tensors = [
            part.clone().view(kind).view(shape)
            for part, kind, shape in zip(flat.split(sizes), kinds, shapes, strict=True)
        ]
        self._iwopd_load(zip(names, tensors, strict=True))

    def iwopd_leave(self) -> None:
        """Leave the process group."""
        group = self._iwopd_group
        del self._iwopd_group
        dist.destroy_process_group(group)

    def iwopd_end(self) -> None:
        """End the update; RuntimeError if a weight of the model was not among the tensors."""
        update = self._iwopd_update
        missing = update.missing()
        if missing:
            raise RuntimeError(f"no weights came for {len(missing)} tensors, e.g. {missing[0]}")
        with set_current_vllm_config(self.vllm_config):
            update.finish()
        self._iwopd_received = update.received
        del self._iwopd_update
        self.model_runner.reset_lora_state()

    def iwopd_checksums(self) -> dict[str, str]:
        """Return the sha256 (first 16 digits) of each tensor of the last update.

        It is of the live parameter where this worker keeps the tensor whole under the same name, of
        what was received where the engine fuses, cuts or packs it.
        """
        live = dict(self.model_runner.get_model().named_parameters())
        return {
            name: _digest(live[name].data[: len(like)]) if _keeps(live.get(name), like) else digest
            for name, (digest, like) in self._iwopd_received.items()
        }

    def _iwopd_load(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        with set_current_vllm_config(self.vllm_config):
            self._iwopd_update.load(tensors)


class _Update:
    """One replacement of a worker's weights: what it wants, and what it was given."""

    def __init__(self, worker: Any, prove: bool):
        self.model, self.config = worker.model_runner.get_model(), worker.model_config
        self.prove = prove
        self.loaded: set[str] = set()
        self.received: dict[str, tuple[str, torch.Tensor]] = {}  # digest, and a tensor on meta
        initialize_layerwise_reload(self.model)
        self.wanted = {name for name, _ in self.model.named_parameters()}
        self.is_tied = worker.model_config.hf_text_config.tie_word_embeddings

    @torch.no_grad()
    def load(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        self.loaded |= self.model.load_weights(self._noted(tensors))

    def _noted(
        self, tensors: Iterable[tuple[str, torch.Tensor]]
    ) -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in tensors:
            if self.prove:
                self.received[name] = _digest(tensor), tensor.to("meta")
            yield name, tensor
            if self.is_tied and name == "model.embed_tokens.weight" and HEAD in self.wanted:
                self._load_tied_head(tensor)

    def _load_tied_head(self, tensor: torch.Tensor) -> None:
        """The head may hold a packed copy of the embedding, which `load_weights` leaves old."""
        head = self.model.get_parameter(HEAD)
        head.weight_loader(head, tensor)
        self.loaded.add(HEAD)

    def missing(self) -> list[str]:
        return sorted(self.wanted - self.loaded)

    @torch.no_grad()
    def finish(self) -> None:
        finalize_layerwise_reload(self.model, self.config)
        if current_platform.is_cpu():
            self._pack_experts()

    def _pack_experts(self) -> None:
        """On CPUs vLLM packs experts' weights only when it loads them the first time."""
        for module in self.model.modules():
            kernel = getattr(getattr(module, "quant_method", None), "moe_kernel", None)
            if kernel is not None and hasattr(module, "w13_weight"):
                kernel.fused_experts.process_weights_after_loading(module)


def _tensors(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():
                yield name, tensors.get_tensor(name)


def _keeps(parameter: torch.Tensor | None, like: torch.Tensor) -> bool:
    """Return whether the parameter is that tensor, but for rows of padding at its end."""
    return (
        parameter is not None
        and parameter.dtype == like.dtype
        and parameter.ndim == like.ndim > 0
        and parameter.shape[1:] == like.shape[1:]
        and len(parameter) >= len(like)
    )


def _digest(tensor: torch.Tensor) -> str:
    data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return hashlib.sha256(data.data).hexdigest()[:16]
