"""Megatron layer specs: TransformerEngine for bf16 on a GPU if installed, else torch-native."""

import contextlib
import importlib.util

import torch

from iwopd_megatron.models.experts import GroupedMoELayer, SwiGluMLP
from iwopd_megatron.models.native import RMSNorm, SdpaAttention
from iwopd_megatron.runtime import device
from iwopd_megatron.runtime.megatron import (
    AttnMaskType,
    ColumnParallelLinear,
    ModuleSpec,
    RowParallelLinear,
    SelfAttention,
    SelfAttentionSubmodules,
    TransformerBlockSubmodules,
    TransformerLayer,
    TransformerLayerSubmodules,
    get_bias_dropout_add,
    get_gpt_decoder_block_spec,
    get_num_layers_to_build,
    get_transformer_layer_offset,
    megatron_moe_utils,
    megatron_random,
)


def has_transformer_engine(dtype: torch.dtype) -> bool:
    """Return whether TransformerEngine is used: installed, on a GPU, parameters in bf16.

    In fp32 its matrix products would be TF32, and its attention has no kernel.
    """
    installed = importlib.util.find_spec("transformer_engine") is not None
    return installed and device.has_gpu() and dtype == torch.bfloat16


def _fill_gaps_without_transformer_engine() -> None:
    """Define what Megatron-Core reads although it is undefined without TransformerEngine."""
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


def block_spec(config, vp_stage: int | None = None):
    """Return this stage's layers, with the modules that Megatron's configuration asks for."""
    if has_transformer_engine(config.params_dtype):
        return get_gpt_decoder_block_spec(config, use_transformer_engine=True, vp_stage=vp_stage)
    _fill_gaps_without_transformer_engine()
    qk_norm = RMSNorm if config.qk_layernorm else None
    attention = ModuleSpec(
        module=SelfAttention,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=SelfAttentionSubmodules(
            linear_qkv=ColumnParallelLinear,
            core_attention=SdpaAttention,
            linear_proj=RowParallelLinear,
            q_layernorm=qk_norm,
            k_layernorm=qk_norm,
        ),
    )
    dense, sparse = (
        ModuleSpec(
            module=TransformerLayer,
            submodules=TransformerLayerSubmodules(
                input_layernorm=RMSNorm,
                self_attention=attention,
                self_attn_bda=get_bias_dropout_add,
                pre_mlp_layernorm=RMSNorm,
                mlp=mlp,
                mlp_bda=get_bias_dropout_add,
            ),
        )
        for mlp in (SwiGluMLP, GroupedMoELayer)
    )
    first = get_transformer_layer_offset(config, vp_stage=vp_stage)
    own = range(first, first + get_num_layers_to_build(config, vp_stage=vp_stage))
    layers = [sparse if _has_experts(config, layer) else dense for layer in own]
    return TransformerBlockSubmodules(layer_specs=layers, layer_norm=RMSNorm)


def _has_experts(config, layer: int) -> bool:
    """Return whether a layer, counted from 0, has experts: all have, or a list says which."""
    if not config.num_moe_experts or isinstance(config.moe_layer_freq, int):
        return config.num_moe_experts is not None
    return config.moe_layer_freq[layer] == 1
