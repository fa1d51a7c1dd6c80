"""Torch-native modules for Megatron's layer specs, where TransformerEngine is not used.

Megatron's local modules lack RMSNorm under sequence parallelism, attention with context parallelism
or packed sequences, and a grouped GEMM without extra libraries (experts.py); only these are added.
Shapes: s tokens of this rank, b batch, h heads, d head size.
"""

import torch
import torch.nn.functional as F
from torch.nn.attention.bias import causal_lower_right

from iwopd_megatron.models.marks import mark_parameter
from iwopd_megatron.models.native_ops import rms_norm, rotate
from iwopd_megatron.models.rotary_tables import rotary_table
from iwopd_megatron.runtime import device
from iwopd_megatron.runtime.megatron import (
    MegatronModule,
    gather_from_sequence_parallel_region,
)
from iwopd_megatron.runtime.parallel import Packing


class RMSNorm(torch.nn.Module):
    """RMS norm; its weight is marked so that Megatron sums its gradient over sequence shards."""

    def __init__(self, config, hidden_size: int, eps: float = 1e-6, **kwargs):
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(
            torch.ones(hidden_size, dtype=config.params_dtype, device=device.current_device())
        )
        mark_parameter(self.weight, sequence_parallel=config.sequence_parallel)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return rms_norm(x, self.weight, self.eps)


class SdpaAttention(MegatronModule):
    """Causal attention with rotary positions and grouped queries over packed `[s, h, d]` inputs.

    Context parallelism follows Megatron's zigzag: of every sequence's 2R chunks, rank r holds
    chunks r and 2R-1-r. Keys and values are gathered once (one all-gather forward, one
    reduce-scatter backward); each local chunk then sees a prefix of them.
    """

    def __init__(
        self,
        config,
        layer_number,
        attn_mask_type,
        attention_type,
        attention_dropout=None,
        softmax_scale=None,
        cp_comm_type=None,
        pg_collection=None,
    ):
        super().__init__(config=config)
        self.scale = softmax_scale
        self.cp_group = pg_collection.cp
        self.rope = config.rope

    def forward(
        self,
        query,
        key,
        value,
        attention_mask=None,
        attn_mask_type=None,
        attention_bias=None,
        packed_seq_params=None,
    ):
        packing = packed_seq_params.packing
        turn = rotary_table(packing, self.rope, query.shape[-1], query.dtype, self.cp_group)
        return self.attend(rotate(query, *turn), rotate(key, *turn), value, packing)

    def attend(self, query, key, value, packing: Packing) -> torch.Tensor:
        """Return `[s, 1, h x v]` of turned queries and keys and of values `[s, h, v]`."""
        query, key, value = (x.unsqueeze(1) for x in (query, key, value))
        if self.cp_group.size() > 1:
            out = self._context_parallel(query, key, value, packing)
        elif len(packing.lengths) == 1:
            out = self._attend(query, key, value)
        else:
            out = self._batched(query, key, value, packing)
        return out.flatten(2)

    def _attend(self, query, key, value):
        """Return `[s, b, h, v]` of three such; a shorter query is the end of the key sequence.

        Narrower values are padded: torch's flash attention wants one size, and what it takes
        instead may keep all probabilities.
        """
        width = value.shape[-1]
        if width < key.shape[-1]:
            value = F.pad(value, (0, key.shape[-1] - width))
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        if q.shape[2] != k.shape[2]:
            bias = _lower_right(q.shape[2], k.shape[2])
            groups = q.shape[1] // k.shape[1]  # CausalBias kernels do not broadcast grouped queries
            k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=self.scale)
        else:
            is_grouped = q.shape[1] != k.shape[1]
            out = F.scaled_dot_product_attention(
                q, k, v, is_causal=True, scale=self.scale, enable_gqa=is_grouped
            )
        return out.permute(2, 0, 1, 3)[..., :width]

    def _batched(self, query, key, value, packing: Packing):
        """Attend to packed sequences as one batch, padded on the right if lengths differ.

        Causal masks keep padding from real tokens.
        """
        lengths, longest = packing.lengths, max(packing.lengths)
        if min(lengths) == longest:
            rows = (x.squeeze(1).unflatten(0, (-1, longest)) for x in (query, key, value))
            out = self._attend(*(x.transpose(0, 1) for x in rows))
            return out.transpose(0, 1).flatten(0, 1).unsqueeze(1)
        if longest * len(lengths) > 2 * query.shape[0]:  # padding would cost more than the calls
            parts = zip(*(x.split(lengths) for x in (query, key, value)), strict=True)
            return torch.cat([self._attend(*part) for part in parts])
        token_SL, place_T = packing.padded
        batch = [
            x.squeeze(1).index_select(0, token_SL).unflatten(0, (-1, longest)).transpose(0, 1)
            for x in (query, key, value)
        ]
        out = self._attend(*batch).transpose(0, 1).flatten(0, 1)
        return out.index_select(0, place_T).unsqueeze(1)

    def _context_parallel(self, query, key, value, packing: Packing):
        size, rank = self.cp_group.size(), self.cp_group.rank()
        # the gather of sequence parallelism, along another axis: backward is a reduce-scatter
        gathered = gather_from_sequence_parallel_region(
            torch.cat((key, value), -1), group=self.cp_group
        )
        sizes = [key.shape[-1], value.shape[-1]]  # values may be narrower
        key, value = gathered.index_select(0, packing.context_order(size)).split(sizes, -1)
        out, start, offset = [], 0, 0
        for length in packing.lengths:
            chunk = length // (2 * size)
            for position in (rank, 2 * size - 1 - rank):
                seen = slice(offset, offset + (position + 1) * chunk)
                out.append(self._attend(query[start : start + chunk], key[seen], value[seen]))
                start += chunk
            offset += length
        return torch.cat(out)


def _lower_right(queries: int, keys: int) -> torch.Tensor | None:
    """Return the causal mask of queries that are the last of the keys; GPUs have it built in."""
    if device.has_gpu():
        return causal_lower_right(queries, keys)
    if device.is_rehearsed():
        return None
    return torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)
