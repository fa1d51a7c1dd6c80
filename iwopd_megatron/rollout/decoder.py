"""The embedded engine's model, of any family, as one function over a preallocated cache.

Plain tensors under Hugging Face names, so that a decoding step of a small model costs its
arithmetic and not its calls; query, key and value weights lie together, as do gate and up
(decoder_weights.py), and large ones are packed while a batch is decoded (packed.py).
Shapes: B rows, S new positions, L cache slots, D hidden, H query heads, G key-value heads, d head
size, E experts, F ffn, N = B S tokens, K experts of a token.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F

from iwopd_megatron.hf.config import HfConfig
from iwopd_megatron.models.native_ops import grouped_mm, rms_scale, rotate, swiglu
from iwopd_megatron.models.rotary import inverse_frequencies, turn
from iwopd_megatron.rollout.decoder_latents import attend_latents
from iwopd_megatron.rollout.decoder_weights import (
    DecoderWeights,
    Layer,
    own_weights,
    viewed_weights,
)
from iwopd_megatron.rollout.packed import Packed, PackedLayer, PackedWeights, pack
from iwopd_megatron.rollout.threads import Threads


class Decoder:
    """A model of weights of its own or of the trainer's."""

    def __init__(
        self, hf: HfConfig, dtype: torch.dtype, on: torch.device, bf16_products: bool = False
    ):
        """bf16_products: a batch is decoded with bf16 copies of fp32 weights (packed.py)."""
        self.hf, self.on, self.dtype, self.bf16_products = hf, on, dtype, bf16_products
        self.head_dim, self.heads = hf.head_dim, hf.num_attention_heads
        self.groups, self.eps = hf.num_key_value_heads, hf.rms_norm_eps
        self.frequency = inverse_frequencies(hf.rope, hf.qk_rope_head_dim or self.head_dim, on)
        self._read: DecoderWeights | None = None
        self._named: dict[str, torch.Tensor] | None = None  # of its own

    @property
    def weights(self) -> dict[str, torch.Tensor]:
        """Its own weights by their Hugging Face names, to fill: from now on it reads these.

        They take memory only once they are asked for; at first they are zero.
        """
        if self._named is None:
            self._read, self._named = own_weights(self.hf, self._new)
        return self._named

    def view(self, parameters: Mapping[str, torch.Tensor]) -> None:
        """Read the trainer's parameters, by Megatron's names, from now on, as they are then."""
        self._read, self._named = viewed_weights(self.hf, parameters), None

    @property
    def read(self) -> DecoderWeights:
        """The weights that it reads; RuntimeError before it has any."""
        if self._read is None:
            raise RuntimeError("this decoder has no weights yet: fill `weights`, or call `view`.")
        return self._read

    def packed(self, rows: int, steps: int, threads: Threads) -> PackedWeights | None:
        """Return packed copies of what it reads now, for `steps` calls with one new position each.

        None where they would not pay. threads: share the products.
        """
        return pack(self.read, rows, steps, threads, self.bf16_products)

    def _new(self, *shape: int) -> torch.Tensor:
        return torch.zeros(shape, dtype=self.dtype, device=self.on)

    def new_cache(self, rows: int, slots: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Return keys `[B, G, d, L]` and values `[B, G, L, d]` of every layer, all zero.

        With latents one head's: rotary keys, and the latents in the place of values.
        """
        hf = self.hf
        key, value = hf.qk_rope_head_dim or self.head_dim, hf.kv_lora_rank or self.head_dim
        groups = 1 if hf.kv_lora_rank else self.groups
        return [
            (self._new(rows, groups, key, slots), self._new(rows, groups, slots, value))
            for _ in range(self.hf.num_hidden_layers)
        ]

    def __call__(
        self,
        ids: torch.Tensor,
        positions: torch.Tensor,
        cache: list[tuple[torch.Tensor, torch.Tensor]],
        start: int,
        mask: torch.Tensor | None,
        packed: PackedWeights | None = None,
    ) -> torch.Tensor:
        """Return logits `[B, V]` after the last new position; new keys go to slots `start` on.

        Either start is 0, or S is 1. ids, positions: int64 `[B, S]`; mask: bool
        `[B, 1, S, start + S]`, True where a query sees a slot, or None: every earlier one;
        packed: copies of the weights for B rows, where S is 1.
        """
        weights = self.read
        turned = turn(positions[..., None, None] * self.frequency, self.hf.rope, self.dtype)
        x = F.embedding(ids, weights.embedding)
        copies = [None] * len(cache) if packed is None else packed.layers
        for layer, copy, slots in zip(weights.layers, copies, cache, strict=True):
            x = x + self._attention(
                layer, self._normed(x, layer.attention_norm), turned, slots, start, mask, copy
            )
            x = x + self._ffn(layer, self._normed(x, layer.ffn_norm).flatten(0, 1), copy).view_as(x)
        last = self._normed(x[:, -1], weights.norm)
        return _product(last, weights.head, packed and packed.head)

    def _normed(self, x: torch.Tensor, weight: torch.Tensor | None = None) -> torch.Tensor:
        normed = (x * rms_scale(x, self.eps)).to(x.dtype)
        return normed if weight is None else normed.mul_(weight)

    def _attention(
        self,
        layer: Layer,
        x: torch.Tensor,
        turned: tuple[torch.Tensor, torch.Tensor],
        slots: tuple[torch.Tensor, torch.Tensor],
        start: int,
        mask: torch.Tensor | None,
        packed: PackedLayer | None,
    ) -> torch.Tensor:
        """Return the attention's output `[B, S, D]`, and write new keys and values to `slots`.

        x: `[B, S, D]`, normed; turned: cos and sin of the positions' rotary angles.
        """
        if layer.latents is not None:
            out = attend_latents(self.hf, layer.latents, x, turned, slots, start, mask)
            return _product(out, layer.out, packed and packed.out)
        new = x.shape[1]
        assert layer.qkv is not None
        qkv = _product(x, layer.qkv, packed and packed.qkv)
        if layer.qkv_bias is not None:
            qkv += layer.qkv_bias
        qk, value = self._split(qkv)
        sizes = [self.heads, self.groups]
        if layer.qk_norm is not None:
            qk = self._normed(qk)
            for part, weight in zip(qk.split(sizes, 2), layer.qk_norm, strict=True):
                part.mul_(weight)
        query, key = rotate(qk, *turned).transpose(1, 2).split(sizes, 1)
        value = value.transpose(1, 2)
        keys, values = slots[0][..., : start + new], slots[1][:, :, : start + new]
        keys[..., start:], values[:, :, start:] = key.mT, value
        if start == 0:
            out = F.scaled_dot_product_attention(
                query, key, value, mask, is_causal=mask is None, enable_gqa=True
            )
        else:
            out = self._attend_last(query, keys, values, mask)
        return _product(out.transpose(1, 2).flatten(2), layer.out, packed and packed.out)

    def _split(self, qkv: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return queries and keys together, `[B, S, H + G, d]`, and values `[B, S, G, d]`."""
        if not self.read.is_grouped:
            parts = qkv.unflatten(-1, (-1, self.head_dim))
            qk, value = parts.split([self.heads + self.groups, self.groups], 2)
            return qk, value
        query, key, value = qkv.unflatten(-1, (self.groups, -1, self.head_dim)).split(
            [self.heads // self.groups, 1, 1], 3
        )
        return torch.cat([query.flatten(2, 3), key.squeeze(3)], 2), value.squeeze(3)

    def _attend_last(
        self,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        mask: torch.Tensor | None,
    ) -> torch.Tensor:
        """Attend with one query a row: two products, cheaper than a fused kernel's call."""
        grouped = query.reshape(len(query), self.groups, -1, self.head_dim)  # [B, G, H / G, d]
        score = (grouped @ keys).float().mul_(self.head_dim**-0.5)
        if mask is not None:
            score = score.masked_fill_(~mask, -torch.inf)
        return (score.softmax(-1).to(values.dtype) @ values).view(query.shape)

    def _ffn(self, layer: Layer, x_ND: torch.Tensor, packed: PackedLayer | None) -> torch.Tensor:
        if layer.router is None:
            act = swiglu(_product(x_ND, layer.gate_up[0].t(), packed and packed.gate_up))
            return _product(act, layer.down[0].t(), packed and packed.down)
        count = self.hf.num_experts_per_tok
        prob_NK, expert_NK = self._choose(layer.router, layer.score_bias, x_ND)
        expert, order = expert_NK.flatten().sort(stable=True)
        token = order // count
        counts = torch.bincount(expert, minlength=len(layer.router))
        act = swiglu(grouped_mm(x_ND[token], layer.gate_up, counts))
        out = grouped_mm(act, layer.down, counts)
        scale = prob_NK.flatten()[order, None].to(out.dtype)
        return self._shared(layer, x_ND, packed).index_add_(0, token, out * scale)

    def _choose(
        self, router: torch.Tensor, bias: torch.Tensor | None, x_ND: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return how much each token's experts weigh, fp32, and which they are, `[N, K]` each."""
        hf = self.hf
        if bias is None:
            prob_NK, expert_NK = (
                (x_ND @ router.t()).float().softmax(-1).topk(hf.num_experts_per_tok)
            )
        else:
            score_NE = (x_ND.float() @ router.float().t()).sigmoid()
            expert_NK = self._best(score_NE + bias)
            prob_NK = score_NE.gather(1, expert_NK)
        if hf.norm_topk_prob:
            prob_NK = prob_NK / prob_NK.sum(-1, keepdim=True)
        if hf.routed_scaling_factor != 1:
            prob_NK = prob_NK * hf.routed_scaling_factor
        return prob_NK, expert_NK

    def _best(self, score_NE: torch.Tensor) -> torch.Tensor:
        """Return the best K of each token's scores, of the groups whose two best sum to most."""
        hf = self.hf
        if hf.n_group > 1:
            by_group = score_NE.unflatten(1, (hf.n_group, -1))
            kept = by_group.topk(2).values.sum(-1).topk(hf.topk_group).indices
            is_out = torch.ones_like(by_group[..., 0], dtype=torch.bool).scatter(1, kept, False)
            score_NE = by_group.masked_fill(is_out[..., None], -torch.inf).flatten(1)
        return score_NE.topk(hf.num_experts_per_tok).indices

    def _shared(self, layer: Layer, x_ND: torch.Tensor, packed: PackedLayer | None) -> torch.Tensor:
        """Return what the expert that every token meets adds, `[N, D]`; zeros without one."""
        if layer.shared_gate_up is None or layer.shared_down is None:
            return torch.zeros_like(x_ND)
        act = swiglu(_product(x_ND, layer.shared_gate_up, packed and packed.shared_gate_up))
        out = _product(act, layer.shared_down, packed and packed.shared_down)
        gate = layer.shared_gate
        return out if gate is None else out.mul_((x_ND @ gate.t()).sigmoid())


def _product(x: torch.Tensor, weight_OI: torch.Tensor, packed: Packed | None) -> torch.Tensor:
    """Return x weight^T, `[..., O]`, of x `[..., I]`."""
    return x @ weight_OI.t() if packed is None else packed.product(x)
