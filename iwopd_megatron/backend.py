"""Megatron layer specs: TransformerEngine for bf16 on a GPU if installed, torch-native otherwise.

Megatron's local modules lack RMSNorm under sequence parallelism, attention with context parallelism
or packed sequences, and a grouped GEMM without extra libraries; only these three are added here.
Shapes: s tokens of this rank, b batch, h heads, d head size, E local experts.
"""

import contextlib
import importlib.util

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.attention.bias import causal_lower_right

from iwopd_megatron import device

device.install()

import megatron.core.tensor_parallel.random as megatron_random  # noqa: E402
import megatron.core.transformer.moe.experts as megatron_experts  # noqa: E402
import megatron.core.transformer.moe.moe_utils as megatron_moe_utils  # noqa: E402
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add  # noqa: E402
from megatron.core.models.backends import LocalSpecProvider  # noqa: E402
from megatron.core.models.gpt.gpt_layer_specs import (  # noqa: E402
    get_gpt_decoder_block_spec,
    get_mlp_module_spec_for_backend,
)
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules  # noqa: E402
from megatron.core.transformer.enums import AttnMaskType  # noqa: E402
from megatron.core.transformer.module import MegatronModule  # noqa: E402
from megatron.core.transformer.spec_utils import ModuleSpec  # noqa: E402
from megatron.core.transformer.transformer_block import (  # noqa: E402
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from megatron.core.transformer.transformer_layer import (  # noqa: E402
    TransformerLayer,
    TransformerLayerSubmodules,
)

from iwopd_megatron.parallel import Packing  # noqa: E402


def has_transformer_engine(dtype: torch.dtype) -> bool:
    """TransformerEngine is used when it is installed, a GPU is present and parameters are bf16.

    In fp32 its matrix products would be TF32, and its attention has no kernel.
    """
    installed = importlib.util.find_spec("transformer_engine") is not None
    return installed and device.has_gpu() and dtype == torch.bfloat16


def _fill_gaps_without_transformer_engine() -> None:
    """Names Megatron-Core 0.16.1 reads, undefined without TransformerEngine or grouped_gemm."""
    if not hasattr(megatron_moe_utils, "te_general_gemm"):
        megatron_moe_utils.te_general_gemm = None
    if not hasattr(megatron_random, "FP8GlobalStateManager"):

        class NoFp8:
            is_fp8_enabled = staticmethod(lambda: False)
            get_fp8_recipe = staticmethod(lambda: None)

        megatron_random.FP8GlobalStateManager = NoFp8
        megatron_random.fp8_autocast = lambda *args, **kwargs: contextlib.nullcontext()
        megatron_random.activation_recompute_forward = lambda *args, **kwargs: (
            contextlib.nullcontext()
        )
    if not megatron_experts.gg.grouped_gemm_is_available():
        megatron_experts.gg.assert_grouped_gemm_is_available = lambda: None


class RMSNorm(torch.nn.Module):
    """`F.rms_norm`; marks its weight so that Megatron sums its gradient over sequence shards."""

    def __init__(self, config, hidden_size: int, eps: float = 1e-6, **kwargs):
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(
            torch.ones(hidden_size, dtype=config.params_dtype, device=device.current_device())
        )
        self.weight.sequence_parallel = config.sequence_parallel

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, (x.shape[-1],), self.weight, self.eps)


class _GatherTokens(torch.autograd.Function):
    """All-gather along dim 0 forward, reduce-scatter backward."""

    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        out = x.new_empty((group.size() * x.shape[0], *x.shape[1:]))
        dist.all_gather_into_tensor(out, x.contiguous(), group=group)
        return out

    @staticmethod
    def backward(ctx, grad):
        out = grad.new_empty((grad.shape[0] // ctx.group.size(), *grad.shape[1:]))
        dist.reduce_scatter_tensor(out, grad.contiguous(), group=ctx.group)
        return out, None


class SdpaAttention(MegatronModule):
    """Causal attention with grouped queries over packed `[s, h, d]` inputs.

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
        query, key, value = (x.unsqueeze(1) for x in (query, key, value))
        if self.cp_group.size() > 1:
            out = self._context_parallel(query, key, value, packing)
        elif len(packing.lengths) == 1:
            out = self._attend(query, key, value)
        else:
            out = self._batched(query, key, value, packing)
        return out.flatten(2)

    def _attend(self, query, key, value):
        """`[s, b, h, d]` x 3 -> `[s, b, h, d]`; a shorter query is the end of the key sequence."""
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        bias = {"is_causal": True}
        if q.shape[2] != k.shape[2]:
            bias = {"attn_mask": causal_lower_right(q.shape[2], k.shape[2])}
            groups = q.shape[1] // k.shape[1]  # CausalBias kernels do not broadcast grouped queries
            k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        else:
            bias["enable_gqa"] = q.shape[1] != k.shape[1]
        return F.scaled_dot_product_attention(q, k, v, scale=self.scale, **bias).permute(2, 0, 1, 3)

    def _batched(self, query, key, value, packing: Packing):
        """Packed sequences as a right-padded batch; causal masks keep padding from real tokens."""
        lengths, longest = packing.lengths, max(packing.lengths)
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
        gathered = _GatherTokens.apply(torch.stack((key, value), 1), self.cp_group)
        key, value = gathered.index_select(0, packing.context_order(size)).unbind(1)
        out, start, offset = [], 0, 0
        for length in packing.lengths:
            chunk = length // (2 * size)
            for position in (rank, 2 * size - 1 - rank):
                seen = slice(offset, offset + (position + 1) * chunk)
                out.append(self._attend(query[start : start + chunk], key[seen], value[seen]))
                start += chunk
            offset += length
        return torch.cat(out)


def grouped_mm(
    x: torch.Tensor, weight: torch.Tensor, tokens_per_expert: torch.Tensor
) -> torch.Tensor:
    """`x[rows of expert e] @ weight[e]`: x `[tokens, in]` sorted by expert, weight `[E, in, out]`.

    One kernel for bf16 on a GPU; elsewhere one matrix product per expert.
    """
    kernel = device.grouped_mm_kernel()
    if kernel is not None and x.dtype == torch.bfloat16:
        ends = tokens_per_expert.to(x.device, non_blocking=True).cumsum(0, dtype=torch.int32)
        return kernel(x, weight, offs=ends)
    parts = x.split(tokens_per_expert.tolist())
    return torch.cat([part @ w for part, w in zip(parts, weight.unbind(), strict=True)])


class GroupedExperts(megatron_experts.GroupedMLP):
    """Megatron's experts (parameters, sharding, checkpoints) on torch's grouped GEMM, any dtype."""

    def forward(self, hidden, tokens_per_expert, probs):
        weight1 = self.weight1.view(self.num_local_experts, self.config.hidden_size, -1)
        weight2 = self.weight2.view(self.num_local_experts, -1, self.config.hidden_size)
        act = self.activation_func_with_probs(
            grouped_mm(hidden, weight1, tokens_per_expert), probs.unsqueeze(-1)
        )
        return grouped_mm(act, weight2, tokens_per_expert), None


class NativeSpecProvider(LocalSpecProvider):
    """Megatron's local linears with the three modules above."""

    def layer_norm(self, rms_norm: bool = False, for_qk: bool = False) -> type:
        return RMSNorm

    def core_attention(self) -> type:
        return SdpaAttention

    def grouped_mlp_modules(self, moe_use_grouped_gemm, moe_use_legacy_grouped_gemm):
        return GroupedExperts, None


def block_spec(config, vp_stage: int | None = None):
    """This pipeline stage's layers for a Qwen3-like model (QK-norm, RMSNorm, SwiGLU or MoE)."""
    if has_transformer_engine(config.params_dtype):
        return get_gpt_decoder_block_spec(config, use_transformer_engine=True, vp_stage=vp_stage)
    _fill_gaps_without_transformer_engine()
    backend = NativeSpecProvider()
    attention = ModuleSpec(
        module=SelfAttention,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=SelfAttentionSubmodules(
            linear_qkv=backend.column_parallel_linear(),
            core_attention=backend.core_attention(),
            linear_proj=backend.row_parallel_linear(),
            q_layernorm=RMSNorm,
            k_layernorm=RMSNorm,
        ),
    )
    layer = ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=RMSNorm,
            self_attention=attention,
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=RMSNorm,
            mlp=get_mlp_module_spec_for_backend(backend, num_experts=config.num_moe_experts),
            mlp_bda=get_bias_dropout_add,
        ),
    )
    count = get_num_layers_to_build(config, vp_stage=vp_stage)
    return TransformerBlockSubmodules(layer_specs=[layer] * count, layer_norm=RMSNorm)
