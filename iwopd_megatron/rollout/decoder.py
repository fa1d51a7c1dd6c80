"""The embedded engine's model: Qwen3 and Qwen3-MoE as one function over a preallocated cache.

Plain tensors under Hugging Face names, so that a decoding step of a small model costs its
arithmetic and not its calls; query, key and value weights lie together, as do gate and up.
Shapes: B rows, S new positions, L cache slots, D hidden, H query heads, G key-value heads, d head
size, E experts, F ffn, N = B S tokens, K experts of a token.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F

from iwopd_megatron.hf.config import HfConfig
from iwopd_megatron.models.native_ops import grouped_mm, rms_scale, rotate, swiglu
from iwopd_megatron.models.rotary import inverse_frequencies, turn


class Layer(NamedTuple):
    """One layer's weights. Dense: one expert and no router."""

    attention_norm: torch.Tensor  # [D]
    qkv: torch.Tensor  # [(H + 2 G) d, D]
    qk_norm: torch.Tensor  # [2, d]
    out: torch.Tensor  # [D, H d]
    ffn_norm: torch.Tensor  # [D]
    router: torch.Tensor | None  # [E, D]
    gate_up: torch.Tensor  # [E, D, 2 F]
    down: torch.Tensor  # [E, F, D]


class Decoder:
    """A Qwen3 or Qwen3-MoE model; `weights` has every tensor by its Hugging Face name, to fill."""

    def __init__(self, hf: HfConfig, dtype: torch.dtype, on: torch.device):
        self.hf, self.on, self.dtype = hf, on, dtype
        self.head_dim, self.heads = hf.head_dim, hf.num_attention_heads
        self.groups, self.eps = hf.num_key_value_heads, hf.rms_norm_eps
        hidden = hf.hidden_size
        self.embedding, self.norm = self._new(hf.vocab_size, hidden), self._new(hidden)
        tied = hf.tie_word_embeddings
        self.head = self.embedding if tied else self._new(hf.vocab_size, hidden)
        self.weights = {"model.embed_tokens.weight": self.embedding, "model.norm.weight": self.norm}
        if not tied:
            self.weights["lm_head.weight"] = self.head
        self.layers = [self._layer(i) for i in range(hf.num_hidden_layers)]
        self.frequency = inverse_frequencies(hf.rope, self.head_dim, on)

    def _new(self, *shape: int) -> torch.Tensor:
        return torch.zeros(shape, dtype=self.dtype, device=self.on)

    def _layer(self, i: int) -> Layer:
        hf, hidden, head = self.hf, self.hf.hidden_size, self.head_dim
        experts = hf.num_experts
        ffn = hf.ffn_size
        layer = Layer(
            attention_norm=self._new(hidden),
            qkv=self._new((self.heads + 2 * self.groups) * head, hidden),
            qk_norm=self._new(2, head),
            out=self._new(hidden, self.heads * head),
            ffn_norm=self._new(hidden),
            router=self._new(experts, hidden) if experts else None,
            gate_up=self._new(experts or 1, hidden, 2 * ffn),
            down=self._new(experts or 1, ffn, hidden),
        )
        rows = [self.heads * head, self.groups * head, self.groups * head]
        own = dict(zip(("q_proj", "k_proj", "v_proj"), layer.qkv.split(rows), strict=True))
        own |= {"q_norm": layer.qk_norm[0], "k_norm": layer.qk_norm[1], "o_proj": layer.out}
        own = {f"self_attn.{name}": tensor for name, tensor in own.items()}
        own |= {"input_layernorm": layer.attention_norm, "post_attention_layernorm": layer.ffn_norm}
        if layer.router is not None:
            own["mlp.gate"] = layer.router
        for e, (gate_up, down) in enumerate(zip(layer.gate_up.mT, layer.down.mT, strict=True)):
            prefix = f"mlp.experts.{e}." if experts else "mlp."
            gate, up = gate_up.chunk(2)
            own |= {prefix + "gate_proj": gate, prefix + "up_proj": up, prefix + "down_proj": down}
        self.weights |= {f"model.layers.{i}.{name}.weight": tensor for name, tensor in own.items()}
        return layer

    def new_cache(self, rows: int, slots: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Return keys `[B, G, d, L]` and values `[B, G, L, d]` of every layer, all zero."""
        shape = rows, self.groups, slots, self.head_dim
        return [(self._new(*shape).mT.contiguous(), self._new(*shape)) for _ in self.layers]

    def __call__(
        self,
        ids: torch.Tensor,
        positions: torch.Tensor,
        cache: list[tuple[torch.Tensor, torch.Tensor]],
        start: int,
        mask: torch.Tensor | None,
    ) -> torch.Tensor:
        """Return logits `[B, V]` after the last new position; new keys go to slots `start` on.

        Either start is 0, or S is 1. ids, positions: int64 `[B, S]`; mask: bool
        `[B, 1, S, start + S]`, True where a query sees a slot, or None: every earlier one.
        """
        turned = turn(positions[..., None, None] * self.frequency, self.hf.rope, self.dtype)
        x = F.embedding(ids, self.embedding)
        for layer, slots in zip(self.layers, cache, strict=True):
            x = x + self._attention(
                layer, self._normed(x, layer.attention_norm), turned, slots, start, mask
            )
            x = x + self._ffn(layer, self._normed(x, layer.ffn_norm).flatten(0, 1)).view_as(x)
        return self._normed(x[:, -1], self.norm) @ self.head.t()

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
    ) -> torch.Tensor:
        """Return the attention's output `[B, S, D]`, and write new keys and values to `slots`.

        x: `[B, S, D]`, normed; turned: cos and sin of the positions' rotary angles.
        """
        rows, new = x.shape[:2]
        qkv = (x @ layer.qkv.t()).view(rows, new, -1, self.head_dim)
        qk, value = qkv.split([self.heads + self.groups, self.groups], 2)
        qk, sizes = self._normed(qk), [self.heads, self.groups]
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
        return out.transpose(1, 2).flatten(2) @ layer.out.t()

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

    def _ffn(self, layer: Layer, x_ND: torch.Tensor) -> torch.Tensor:
        if layer.router is None:
            return swiglu(x_ND @ layer.gate_up[0]) @ layer.down[0]
        count = self.hf.num_experts_per_tok
        prob_NK, expert_NK = (x_ND @ layer.router.t()).float().softmax(-1).topk(count)
        if self.hf.norm_topk_prob:
            prob_NK = prob_NK / prob_NK.sum(-1, keepdim=True)
        expert, order = expert_NK.flatten().sort(stable=True)
        token = order // count
        counts = torch.bincount(expert, minlength=len(layer.router))
        act = swiglu(grouped_mm(x_ND[token], layer.gate_up, counts))
        out = grouped_mm(act, layer.down, counts)
        scale = prob_NK.flatten()[order, None].to(out.dtype)
        return torch.zeros_like(x_ND).index_add_(0, token, out * scale)
