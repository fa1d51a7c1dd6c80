"""Latent attention (MLA) of the embedded engine: latents and rotary keys are cached, not heads.

A prompt's keys and values are made of its latents; a later token's query is brought into the
latents' space instead, and what it attends to is brought back (arXiv 2405.04434, section 2.1.2).
Shapes: B rows, S new positions, L slots, D hidden, H heads, n and r sizes of the unturned and the
turned part of queries and keys, v of values, Q and C of the latents.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F

from iwopd_megatron.hf.config import HfConfig
from iwopd_megatron.models.native_ops import LATENT_EPS, in_halves, rms_scale, rotate


class LatentWeights(NamedTuple):
    """One layer's projections; queries without a latent have `query` alone."""

    query: torch.Tensor  # [H (n + r), Q], or [H (n + r), D]
    query_down: torch.Tensor | None  # [Q, D]
    query_norm: torch.Tensor | None  # [Q]
    down: torch.Tensor  # [C + r, D]
    norm: torch.Tensor  # [C]
    up: torch.Tensor  # [H (n + v), C]

    def named(self) -> dict[str, torch.Tensor]:
        """Return them by their Hugging Face names within `self_attn`."""
        found = {
            "kv_a_proj_with_mqa.weight": self.down,
            "kv_a_layernorm.weight": self.norm,
            "kv_b_proj.weight": self.up,
        }
        if self.query_down is None or self.query_norm is None:
            return found | {"q_proj.weight": self.query}
        return found | {
            "q_a_proj.weight": self.query_down,
            "q_a_layernorm.weight": self.query_norm,
            "q_b_proj.weight": self.query,
        }


def own_latents(hf: HfConfig, new: Callable[..., torch.Tensor]) -> LatentWeights:
    """Return weights of zeros, to fill."""
    rank, hidden = hf.q_lora_rank, hf.hidden_size
    return LatentWeights(
        query=new(hf.queries, rank or hidden),
        query_down=new(rank, hidden) if rank else None,
        query_norm=new(rank) if rank else None,
        down=new(hf.kv_down, hidden),
        norm=new(hf.kv_lora_rank),
        up=new(hf.kv_up, hf.kv_lora_rank),
    )


def viewed_latents(hf: HfConfig, own: Callable[[str], torch.Tensor]) -> LatentWeights:
    """Return a layer's parameters, which `own` gives by Megatron's names."""

    def weight(name: str) -> torch.Tensor:
        return own(f"self_attention.{name}.weight")

    rank = hf.q_lora_rank
    return LatentWeights(
        query=weight("linear_q_up_proj" if rank else "linear_q_proj"),
        query_down=weight("linear_q_down_proj") if rank else None,
        query_norm=weight("q_layernorm") if rank else None,
        down=weight("linear_kv_down_proj"),
        norm=weight("kv_layernorm"),
        up=weight("linear_kv_up_proj"),
    )


def attend_latents(
    hf: HfConfig,
    layer: LatentWeights,
    x: torch.Tensor,
    turned: tuple[torch.Tensor, torch.Tensor],
    slots: tuple[torch.Tensor, torch.Tensor],
    start: int,
    mask: torch.Tensor | None,
) -> torch.Tensor:
    """Return all heads' outputs `[B, S, H v]` of x `[B, S, D]`, normed.

    New rotary keys and latents go to `slots`, `[B, 1, r, L]` and `[B, 1, L, C]`; turned: cos and
    sin of the positions' rotary angles; start, mask: as `Decoder` takes them.
    """
    own, new = hf.head_dim - hf.qk_rope_head_dim, x.shape[1]
    query = _queries(layer, x).unflatten(-1, (-1, hf.head_dim))
    unturned, query = query.split([own, hf.qk_rope_head_dim], -1)
    latent, key = (x @ layer.down.t()).split([hf.kv_lora_rank, hf.qk_rope_head_dim], -1)
    key = key.unsqueeze(2)  # of one head
    if hf.rope.interleaved:
        query, key = in_halves(query), in_halves(key)
    unturned, query = (part.transpose(1, 2) for part in (unturned, rotate(query, *turned)))
    keys, latents = slots[0][..., : start + new], slots[1][:, :, : start + new]
    keys[..., start:] = rotate(key, *turned).transpose(1, 2).mT
    latents[:, :, start:] = _normed(latent, layer.norm).unsqueeze(1)
    up = layer.up.unflatten(0, (hf.num_attention_heads, -1))  # [H, n + v, C]
    to_key, to_value = up.split([own, hf.value_dim], 1)
    if start == 0:
        both = torch.cat([latents @ to_key.mT, keys.mT.expand(-1, len(up), -1, -1)], -1)
        query, value = torch.cat([unturned, query], -1), latents @ to_value.mT
        causal = mask is None
        out = F.scaled_dot_product_attention(
            query, both, value, mask, is_causal=causal, scale=hf.score_scale
        )
    else:
        score = (unturned @ to_key @ latents.mT + query @ keys).float().mul_(hf.score_scale)
        if mask is not None:
            score = score.masked_fill_(~mask, -torch.inf)
        out = score.softmax(-1).to(x.dtype) @ latents @ to_value.mT
    return out.transpose(1, 2).flatten(2)


def _queries(layer: LatentWeights, x: torch.Tensor) -> torch.Tensor:
    """Return `[B, S, H (n + r)]`, not turned."""
    if layer.query_down is not None and layer.query_norm is not None:
        x = _normed(x @ layer.query_down.t(), layer.query_norm)
    return x @ layer.query.t()


def _normed(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return (x * rms_scale(x, LATENT_EPS)).to(x.dtype).mul_(weight)
