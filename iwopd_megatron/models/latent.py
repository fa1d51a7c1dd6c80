"""Multi-head latent attention (MLA) of torch-native modules: DeepSeek-V2, arXiv 2405.04434.

Keys and values of all heads are made of one narrow latent, and of a rotary key that all heads
share; queries are made of a latent too, or not. The parameters have the names of Megatron's
MLASelfAttention with TransformerEngine, whose down projections every tensor-parallel rank has
whole.
Shapes: s tokens of this rank, T / tp of them under sequence parallelism, h local heads, d size of
queries and keys, r of their turned part, v of values, D hidden size.
"""

import torch
import torch.nn.functional as F

from iwopd_megatron.models.marks import mark_parameter
from iwopd_megatron.models.native import RMSNorm, SdpaAttention
from iwopd_megatron.models.native_ops import LATENT_EPS, in_halves, rotate
from iwopd_megatron.models.rotary_tables import rotary_table
from iwopd_megatron.runtime import device
from iwopd_megatron.runtime.megatron import (
    ColumnParallelLinear,
    MegatronModule,
    RowParallelLinear,
    gather_from_sequence_parallel_region,
)


class WholeLinear(torch.nn.Module):
    """A projection that every tensor-parallel rank has whole, of its own part of the sequence."""

    def __init__(self, config, inputs: int, outputs: int):
        super().__init__()
        dtype, on = config.params_dtype, device.current_device()
        self.weight = torch.nn.Parameter(torch.empty(outputs, inputs, dtype=dtype, device=on))
        config.init_method(self.weight)
        mark_parameter(self.weight, sequence_parallel=config.sequence_parallel)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight)


class LatentAttention(MegatronModule):
    """Causal latent attention over packed sequences, where a Megatron layer has SelfAttention."""

    def __init__(self, config, layer_number: int, pg_collection, **_):
        super().__init__(config=config)
        hf, hidden = config.latents, config.hidden_size
        self.hf, self.tp_group, self.cp_group = hf, pg_collection.tp, pg_collection.cp
        self.parts = [hf.head_dim - hf.qk_rope_head_dim, hf.qk_rope_head_dim]  # of a query or key
        if hf.q_lora_rank:
            self.linear_q_down_proj = WholeLinear(config, hidden, hf.q_lora_rank)
        self.linear_kv_down_proj = WholeLinear(config, hidden, hf.kv_down)
        if hf.q_lora_rank:
            self.q_layernorm = RMSNorm(config, hf.q_lora_rank, LATENT_EPS)
            self.linear_q_up_proj = self._heads(hf.q_lora_rank, hf.queries)
        else:
            self.linear_q_proj = self._heads(hidden, hf.queries)
        self.kv_layernorm = RMSNorm(config, hf.kv_lora_rank, LATENT_EPS)
        self.linear_kv_up_proj = self._heads(hf.kv_lora_rank, hf.kv_up)
        self.core_attention = SdpaAttention(
            config, layer_number, None, "self", None, hf.score_scale, pg_collection=pg_collection
        )
        self.linear_proj = RowParallelLinear(
            hf.values,
            hidden,
            config=config,
            init_method=config.output_layer_init_method,
            bias=False,
            input_is_parallel=True,
            skip_bias_add=True,
            tp_group=self.tp_group,
        )

    def _heads(self, inputs: int, outputs: int) -> ColumnParallelLinear:
        """Return a projection to this rank's heads of all tokens."""
        return ColumnParallelLinear(
            inputs,
            outputs,
            config=self.config,
            init_method=self.config.init_method,
            bias=False,
            gather_output=False,
            tp_group=self.tp_group,
        )

    def forward(self, hidden, attention_mask=None, packed_seq_params=None, **_):
        """Return the output `[T / tp, 1, D]` of hidden states of that shape, and no bias."""
        packing = packed_seq_params.packing
        unturned, turned = self._queries(hidden).split(self.parts, -1)
        latent, key = self.linear_kv_down_proj(hidden).split(
            [self.hf.kv_lora_rank, self.parts[1]], -1
        )
        keys_values = self.linear_kv_up_proj(self.kv_layernorm(latent))[0]
        keys_values = keys_values.squeeze(1).unflatten(-1, (-1, self.parts[0] + self.hf.value_dim))
        if self.config.sequence_parallel:  # backward sums what all ranks' heads give, and cuts it
            key = gather_from_sequence_parallel_region(key, group=self.tp_group)
        turn = rotary_table(packing, self.hf.rope, self.parts[1], hidden.dtype, self.cp_group)
        if self.hf.rope.interleaved:
            turned, key = in_halves(turned), in_halves(key)
        query = torch.cat((unturned, rotate(turned, *turn)), -1)
        keys, value = keys_values.split([self.parts[0], self.hf.value_dim], -1)
        shared = rotate(key, *turn).expand(-1, keys.shape[1], -1)
        keys = torch.cat((keys, shared), -1)
        return self.linear_proj(self.core_attention.attend(query, keys, value, packing))

    def _queries(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return `[s, h, d]`, not turned."""
        if self.hf.q_lora_rank:
            latent = self.q_layernorm(self.linear_q_down_proj(hidden))
            out, _ = self.linear_q_up_proj(latent)
        else:
            out, _ = self.linear_q_proj(hidden)
        return out.squeeze(1).unflatten(-1, (-1, self.hf.head_dim))
