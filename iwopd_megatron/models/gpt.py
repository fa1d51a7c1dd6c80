"""Hugging Face config -> Megatron TransformerConfig -> GPTModel chunks of this rank.

The model returns hidden states, never logits: `logprobs.linear_logprobs` turns them into log-probs
without a `[tokens, vocab]` tensor. What a family's model has, `HfConfig` says.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F

from iwopd_megatron.config.models import Layout
from iwopd_megatron.errors import RecipeError
from iwopd_megatron.hf.config import HfConfig
from iwopd_megatron.models import layer_specs
from iwopd_megatron.models.dispatched import forget_dispatched
from iwopd_megatron.models.expert_settings import expert_settings
from iwopd_megatron.models.marks import mark_parameter
from iwopd_megatron.models.rotary import inverse_frequencies
from iwopd_megatron.runtime import device
from iwopd_megatron.runtime.megatron import (
    Float16Module,
    GPTModel,
    MegatronModule,
    TopKRouter,
    TransformerConfig,
    mpu,
)
from iwopd_megatron.runtime.parallel import Parallel

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class HiddenStateModel(GPTModel):
    """GPTModel whose last stage returns final hidden states `[s / tp, b, D]` instead of logits."""

    def _postprocess(self, hidden_states, *args, **kwargs):
        return hidden_states

    def head_weight(self) -> torch.Tensor:
        """Return this rank's `[V / tp, D]` rows of the LM head; the embedding's where tied."""
        if self.share_embeddings_and_output_weights:
            return self.shared_embedding_or_output_weight()
        return self.output_layer.weight


def transformer_config(
    hf: HfConfig,
    layout: Layout,
    dtype: str = "fp32",
    recompute: str = "none",
    further: Mapping[str, Any] | None = None,
) -> TransformerConfig:
    """Return Megatron's configuration of the model that a config.json describes.

    further: a recipe's own settings of it; RecipeError if Megatron refuses them.
    """
    torch_dtype = DTYPES[dtype]
    is_fused = _has_fused_attention(hf, torch_dtype)
    settings = dict(
        num_layers=hf.num_hidden_layers,
        hidden_size=hf.hidden_size,
        num_attention_heads=hf.num_attention_heads,
        num_query_groups=hf.num_key_value_heads,
        kv_channels=hf.head_dim,
        ffn_hidden_size=hf.intermediate_size,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        add_qkv_bias=hf.qkv_bias,
        normalization="RMSNorm",
        qk_layernorm=hf.qk_norm,
        layernorm_epsilon=hf.rms_norm_eps,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=layout.tp,
        sequence_parallel=layout.tp > 1,
        pipeline_model_parallel_size=layout.pp,
        virtual_pipeline_model_parallel_size=layout.vpp if layout.vpp > 1 else None,
        **layout.placement,
        context_parallel_size=layout.cp,
        # A dense teacher in a world that cuts the student's experts is not cut along those axes.
        expert_model_parallel_size=layout.ep if hf.num_experts else 1,
        expert_tensor_parallel_size=layout.etp if hf.num_experts else 1,
        bf16=dtype == "bf16",
        params_dtype=torch_dtype,
        pipeline_dtype=torch_dtype,
        autocast_dtype=torch_dtype,
        # Loading overwrites every weight, but Megatron 0.16 sets the attribute that the gradient
        # norm needs, to count a tensor-parallel shard once, only while it initialises.
        perform_initialization=True,
        use_cpu_initialization=not device.has_gpu_kernels(),
        calculate_per_token_loss=True,  # gradients are summed; the loss brings its own denominator
        # Over gloo two neighbours that are one process swap their messages when sent as one batch.
        batch_p2p_comm=False,
        masked_softmax_fusion=False,
        persist_layer_norm=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        apply_rope_fusion=is_fused,
        gradient_accumulation_fusion=False,
    )
    if is_fused:  # YaRN's factor on both queries and keys
        settings["softmax_scale"] = hf.rope.attention_factor**2 * hf.head_dim**-0.5
    settings |= expert_settings(hf, torch_dtype) | _recompute_settings(hf, recompute)
    try:
        config = TransformerConfig(**settings | dict(further or {}))
    except (AssertionError, ValueError) as error:
        if not further:
            raise
        reason = " ".join(str(error).split()).rstrip(".")
        raise RecipeError(f"Megatron-Core refuses student.megatron: {reason}.") from None
    config.rope = hf.rope  # native attention turns queries and keys by it
    config.latents = hf if hf.kv_lora_rank else None
    return config


def _has_fused_attention(hf: HfConfig, dtype: torch.dtype) -> bool:
    """Return whether attention is TransformerEngine's; with latents it is always native."""
    return layer_specs.has_transformer_engine(dtype) and not hf.kv_lora_rank


def _recompute_settings(hf: HfConfig, recompute: str) -> dict[str, Any]:
    if recompute == "full":
        return dict(
            recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1
        )
    if recompute == "selective":
        modules = ["core_attn"] + ["moe"] * (hf.num_experts > 0)
        modules += ["mlp"] * (not hf.has_experts(0))
        return dict(recompute_granularity="selective", recompute_modules=modules)
    return {}


def build_model(
    hf: HfConfig,
    parallel: Parallel,
    dtype: str = "fp32",
    recompute: str = "none",
    further: Mapping[str, Any] | None = None,
) -> list[HiddenStateModel]:
    """Return this rank's `layout.vpp` chunks in `dtype`, of initial weights: load others later.

    further: as `transformer_config` takes it.
    """
    layout = parallel.layout
    config = transformer_config(hf, layout, dtype, recompute, further)
    fused = _has_fused_attention(hf, config.params_dtype)
    chunks = []
    for stage in range(layout.vpp):
        vp_stage = stage if layout.vpp > 1 else None
        chunk = HiddenStateModel(
            config,
            layer_specs.block_spec(config, vp_stage),
            vocab_size=hf.vocab_size,  # never padded: padding columns would enter the normaliser
            max_sequence_length=hf.max_position_embeddings,
            pre_process=mpu.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage),
            post_process=mpu.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage),
            # native attention turns queries and keys itself, once per micro-batch computed
            position_embedding_type="rope" if fused else "none",
            rotary_base=hf.rope.theta,
            rotary_percent=hf.rope.partial_rotary_factor,
            share_embeddings_and_output_weights=hf.tie_word_embeddings,
            vp_stage=vp_stage,
        ).to(device.current_device())
        if fused:
            chunk.rotary_pos_emb.inv_freq.copy_(
                inverse_frequencies(hf.rope, hf.head_dim, device.current_device())
            )
        mark_expert_parameters(chunk)
        forget_dispatched(chunk)
        if chunk.pre_process and hf.pad_token_id is not None:
            withhold_pad_gradient(chunk.embedding.word_embeddings, hf.pad_token_id, parallel)
        chunks.append(chunk)
    return chunks


def mark_expert_parameters(chunk: torch.nn.Module) -> None:
    """Reduce expert gradients over the expert-data group in every layout.

    Megatron marks them only when ep > 1; with ep = 1 and etp != tp it would reduce them over the
    wrong ranks, and optimiser states would not load across a change of ep.
    """
    for name, parameter in chunk.named_parameters():
        if ".experts." in name:
            mark_parameter(parameter, allreduce=False)


def withhold_pad_gradient(embedding: torch.nn.Module, pad_id: int, parallel: Parallel) -> None:
    """Let a look-up of the pad token train nothing, as transformers does (`padding_idx`).

    transformers starts that row at zero, where RMSNorm's gradient is 1 / sqrt(eps) = 1000 times
    what it is elsewhere: one pad token that a student samples would fill the whole gradient norm,
    and clipping would spend the step on it. A tied row still learns as a row of the LM head.
    """

    def withhold(module, arguments, output):
        is_pad = arguments[0] == pad_id  # [b, s]
        if parallel.layout.tp > 1:  # the output is this rank's part of the sequence, [s / tp, b, D]
            is_pad = is_pad.t().chunk(parallel.tp.size)[parallel.tp.rank]
        if output.requires_grad:
            output.register_hook(lambda gradient: gradient.masked_fill(is_pad[..., None], 0))

    embedding.register_forward_hook(withhold)


class HalfPrecisionModel(Float16Module):
    """Megatron's bf16 wrapper, whose last stage returns bf16 too: the LM head sums in fp32."""

    def forward(self, *inputs, **kwargs):
        return super().forward(*inputs, fp32_output=False, **kwargs)


def wrap_precision(chunks: list[HiddenStateModel]) -> list[MegatronModule]:
    """Cast bf16 chunks and their pipeline inputs as Megatron does; fp32 chunks pass through.

    Routers' buffers stay in fp32: rounded, biases would choose other experts.
    """
    config = chunks[0].config
    if not config.bf16:
        return list(chunks)
    routers = [x for chunk in chunks for x in chunk.modules() if isinstance(x, TopKRouter)]
    kept = [(router, dict(router.named_buffers(recurse=False))) for router in routers]
    for router, buffers in kept:
        for name in buffers:
            setattr(router, name, None)
    wrapped: list[MegatronModule] = [HalfPrecisionModel(config, chunk) for chunk in chunks]
    for router, buffers in kept:
        for name, buffer in buffers.items():
            setattr(router, name, buffer)
    return wrapped
