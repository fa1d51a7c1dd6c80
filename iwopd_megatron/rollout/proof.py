"""Proof that weights landed: what a server says it holds against what the trainer sent.

SGLang keeps several Hugging Face tensors as one, cut over its tensor-parallel ranks, and hashes
its own (sha256 of the bytes, first 8). The same is computed here while the tensors stream by.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from typing import Any, Protocol

import torch

from iwopd_megatron.errors import GateError
from iwopd_megatron.hf.config import HfConfig

VOCABULARY_MULTIPLE = 64  # SGLang pads the rows of embedding and head with zeros to this
# the fused tensor that a projection is part of, and its place there
_FUSED = {
    "q_proj": ("qkv_proj", 0),
    "k_proj": ("qkv_proj", 1),
    "v_proj": ("qkv_proj", 2),
    "gate_proj": ("gate_up_proj", 0),
    "up_proj": ("gate_up_proj", 1),
}
_FUSED_LATENTS = {
    "q_a_proj": ("fused_qkv_a_proj_with_mqa", 0),
    "kv_a_proj_with_mqa": ("fused_qkv_a_proj_with_mqa", 1),
}
_BY_HEADS = ("q_proj", "q_b_proj", "kv_b_proj")  # with latents: cut, and not fused
_EXPERT = re.compile(r"(.*\.experts)\.(\d+)\.(gate|up|down)_proj\.weight")


class Fingerprints(Protocol):
    """Hashes of what each of a server's ranks must hold, by the name the server gives it."""

    ranks: list[dict[str, str]]

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Take one whole tensor under its Hugging Face name; tensors come in any order."""
        ...


class SglangFingerprints:
    """Hashes of what each of `tp` ranks must hold; holds parts only until their tensor is whole."""

    def __init__(self, hf: HfConfig, tp: int):
        self.hf, self.tp, self.experts = hf, tp, hf.num_experts
        self.waiting: dict[str, dict[int, torch.Tensor]] = {}
        self.ranks: list[dict[str, str]] = [{} for _ in range(tp)]
        self.fused = _FUSED | (_FUSED_LATENTS if hf.q_lora_rank else {})
        if hf.kv_lora_rank:
            del self.fused["q_proj"]

    def add(self, name: str, tensor: torch.Tensor) -> None:
        if self.hf.sigmoid_router and name.endswith(".mlp.gate.weight"):
            tensor = tensor.float()  # as SGLang keeps these routers
        target, place, count = self._target(name)
        parts = self.waiting.setdefault(target, {})
        parts[place] = tensor.detach().cpu().clone() if count > 1 else tensor.detach().cpu()
        if len(parts) == count:
            whole = self.waiting.pop(target)
            ordered = [whole[i] for i in range(count)]
            for rank, own in enumerate(self.ranks):
                own[target] = _digest(self._shard(target, ordered, rank))

    def _target(self, name: str) -> tuple[str, int, int]:
        """Return SGLang's tensor, the place of this one in it, and how many make it up."""
        expert = _EXPERT.fullmatch(name)
        if expert:
            prefix, number, kind = expert[1], int(expert[2]), expert[3]
            if kind == "down":
                return f"{prefix}.w2_weight", number, self.experts
            return f"{prefix}.w13_weight", 2 * number + (kind == "up"), 2 * self.experts
        *prefix, module, kind = name.split(".")
        if module in self.fused:
            fused, place = self.fused[module]
            return ".".join([*prefix, fused, kind]), place, 3 if fused == "qkv_proj" else 2
        return name, 0, 1

    def _shard(self, target: str, parts: list[torch.Tensor], rank: int) -> Iterable[torch.Tensor]:
        """Return the pieces, in order, that make up the rank's tensor."""
        module = target.split(".")[-2]
        if target.endswith(("w2_weight", "o_proj.weight", "down_proj.weight")):
            return (part.chunk(self.tp, dim=1)[rank] for part in parts)
        if module in ("embed_tokens", "lm_head"):
            return [self._vocabulary(parts[0]).chunk(self.tp)[rank]]
        if module == "qkv_proj":
            query, key, value = parts
            copies = max(1, self.tp // self.hf.num_key_value_heads)  # ranks with one head
            shards = [t.chunk(self.tp // copies)[rank // copies] for t in (key, value)]
            return [query.chunk(self.tp)[rank], *shards]
        if module in _BY_HEADS:
            return [parts[0].chunk(self.tp)[rank]]
        if module == "gate_up_proj" or target.endswith("w13_weight"):
            return (part.chunk(self.tp)[rank] for part in parts)
        return parts

    def _vocabulary(self, tensor: torch.Tensor) -> torch.Tensor:
        rows = -len(tensor) % VOCABULARY_MULTIPLE
        return torch.cat([tensor, tensor.new_zeros(rows, tensor.shape[1])])


def hashes_by_rank(reply: dict[str, Any]) -> list[dict[str, str]]:
    """Return the hashes of each rank's tensors from SGLang's answer, by tensor-parallel rank."""

    def tp_rank(rank: dict[str, Any]) -> int:
        info = rank["parallelism_info"]
        return (info[0] if isinstance(info, list) else info)["tp_rank"]

    return [rank["checksums"] for rank in sorted(reply["ranks"], key=tp_rank)]


class NameFingerprints:
    """Hashes under the Hugging Face names themselves, for servers that hash what they receive."""

    def __init__(self, ranks: int) -> None:
        self.ranks: list[dict[str, str]] = [{}] * ranks  # every rank receives every tensor

    def add(self, name: str, tensor: torch.Tensor) -> None:
        self.ranks[0][name] = _digest([tensor.detach().cpu()])


def _digest(pieces: Iterable[torch.Tensor]) -> str:
    hasher = hashlib.sha256()
    for piece in pieces:
        hasher.update(piece.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return hasher.hexdigest()[:16]


def check_landed(url: str, expected: list[dict[str, str]], found: list[dict[str, str]]) -> None:
    """Raise GateError unless the server holds every tensor of every rank, and no other.

    expected, found: hashes by tensor for each rank, from `Fingerprints` and the server.
    """
    for rank, (ours, theirs) in enumerate(zip(expected, found, strict=True)):
        wrong = sorted(
            name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name)
        )
        if wrong:
            raise GateError(
                f"{url} does not hold the weights it was sent: {len(wrong)} tensors of rank {rank} "
                f"differ, e.g. {wrong[0]}; the update was cut or the engine loads it wrongly."
            )
