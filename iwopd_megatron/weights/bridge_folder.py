"""What Megatron-Bridge and ms-swift keep around a checkpoint, read and written.

OUT/latest_checkpointed_iteration.txt  the iteration that is loaded (Megatron-LM's tracker)
OUT/latest_train_state.pt              Bridge's own tracker: step and samples, as tensors
OUT/iter_0000000/                      the checkpoint, with a train_state.pt
OUT/iter_0000000/run_config.yaml       what Bridge builds the model from: its provider's fields
OUT/iter_0000000/common.pt             ms-swift asks `args` for the layout that wrote it

As Megatron-Bridge 0.6.2 (training/checkpointing.py, models/qwen) and ms-swift 4.6.0
(megatron/utils/megatron_lm_utils.py) write and read them.
"""

from __future__ import annotations

import math
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch
import yaml

from iwopd_megatron.errors import RecipeError
from iwopd_megatron.files.iterations import TRACKER
from iwopd_megatron.files.yaml_file import read_yaml
from iwopd_megatron.hf.companions import FOLDER
from iwopd_megatron.hf.config import HfConfig, read_json
from iwopd_megatron.hf.rope import Rope

RUN_CONFIG = "run_config.yaml"
ITERATION = "iter_0000000"  # Bridge's own import is iteration 0
# In common.pt; ms-swift looks for optimiser and generator states unless it is told of none.
ARGS = Namespace(
    tensor_model_parallel_size=1,
    pipeline_model_parallel_size=1,
    no_save_optim=True,
    no_save_rng=True,
)
_TRAIN_STATE = {
    "step": torch.int64,
    "consumed_train_samples": torch.int64,
    "skipped_train_samples": torch.int64,
    "consumed_valid_samples": torch.int64,
    "floating_point_operations_so_far": torch.float64,
    "do_train": torch.bool,
    "do_valid": torch.bool,
    "do_test": torch.bool,
}


def is_padded(folder: Path, hf: HfConfig) -> bool:
    """Return whether Bridge, as an iteration's run_config.yaml says, padded this vocabulary."""
    file = folder / RUN_CONFIG
    if not file.is_file():
        return False
    model = read_yaml(file, "Megatron-Bridge's").get("model")
    if not isinstance(model, dict):
        raise RecipeError(f"{file} has no section 'model'; it is not Megatron-Bridge's.")
    return model.get("should_pad_vocab") is True and model.get("vocab_size") == hf.vocab_size


def check_provider(hf: HfConfig, source: Path) -> None:
    """Raise RecipeError if Bridge has no model that computes what a config.json says."""
    if hf.sigmoid_router:
        raise RecipeError(
            f"{source}/config.json: folders for Megatron-Bridge are not written of {hf.model_type} "
            "models; write --names te, and build the model on your own."
        )
    rope = hf.rope
    plain = 0.1 * math.log(rope.factor) + 1 if rope.kind == "yarn" and rope.factor > 1 else 1.0
    if rope.kind == "llama3" or not math.isclose(rope.attention_factor, plain):
        raise RecipeError(
            f"{source}/config.json: Megatron-Bridge has no model with its rotary settings "
            f"({rope.kind}); write --names te, and build the model on your own."
        )


def write_around(root: Path, out: Path, hf: HfConfig, dtype: torch.dtype) -> None:
    """Write trackers, train state and run_config.yaml around `root`'s iteration.

    `out` is where root will be. dtype: of the weights.
    """
    state = {key: torch.zeros((), dtype=kind) for key, kind in _TRAIN_STATE.items()}
    for file in (root / ITERATION / "train_state.pt", root / "latest_train_state.pt"):
        torch.save(state, file)
    home = out.resolve() / ITERATION / FOLDER
    initializer = read_json(root / ITERATION / FOLDER, "config.json").get("initializer_range")
    model = _provider(hf, dtype) | {"hf_model_id": str(home)}
    if initializer is not None:
        model["init_method_std"] = initializer
    content = {
        "checkpoint": {"save_optim": False, "save_rng": False, "fully_parallel_save": True},
        "model": model,
        "tokenizer": {
            "_target_": "megatron.bridge.training.tokenizers.config.TokenizerConfig",
            "tokenizer_type": "HuggingFaceTokenizer",
            "tokenizer_model": str(home),
        },
    }
    (root / ITERATION / RUN_CONFIG).write_text(yaml.safe_dump(content, sort_keys=False))
    (root / TRACKER).write_text("0")


def _provider(hf: HfConfig, dtype: torch.dtype) -> dict[str, Any]:
    """Return the fields of Bridge's provider that are not its defaults."""
    fields: dict[str, Any] = {
        "_target_": "megatron.bridge.models.gpt_provider.GPTModelProvider",
        "num_layers": hf.num_hidden_layers,
        "hidden_size": hf.hidden_size,
        "ffn_hidden_size": hf.intermediate_size,
        "num_attention_heads": hf.num_attention_heads,
        "num_query_groups": hf.num_key_value_heads,
        "kv_channels": hf.head_dim,
        "vocab_size": hf.vocab_size,
        "seq_length": hf.max_position_embeddings,
        "layernorm_epsilon": hf.rms_norm_eps,
        "share_embeddings_and_output_weights": hf.tie_word_embeddings,
        "normalization": "RMSNorm",
        "qk_layernorm": hf.qk_norm,
        "gated_linear_unit": True,
        "activation_func": {"_target_": "torch.nn.functional.silu", "_call_": False},
        "add_bias_linear": False,
        "add_qkv_bias": hf.qkv_bias,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "params_dtype": {"_target_": str(dtype), "_call_": False},
        "autocast_dtype": {"_target_": "torch.bfloat16", "_call_": False},
        "bf16": dtype == torch.bfloat16,
        "fp16": dtype == torch.float16,
        "tensor_model_parallel_size": 1,
        "pipeline_model_parallel_size": 1,
    }
    return fields | _rotary(hf.rope) | (_experts(hf) if hf.num_experts else {})


def _rotary(rope: Rope) -> dict[str, Any]:
    if rope.kind == "yarn":
        return {
            "rotary_base": rope.theta,
            "position_embedding_type": "yarn",
            "yarn_rotary_scaling_factor": rope.factor,
            "yarn_original_max_position_embeddings": rope.original_positions,
            "yarn_beta_fast": rope.beta_fast,
            "yarn_beta_slow": rope.beta_slow,
            "yarn_correction_range_round_to_int": rope.truncate,
        }
    fields: dict[str, Any] = {"rotary_base": rope.theta, "position_embedding_type": "rope"}
    return fields | ({"seq_len_interpolation_factor": rope.factor} if rope.kind == "linear" else {})


def _experts(hf: HfConfig) -> dict[str, Any]:
    shared = {
        "moe_shared_expert_intermediate_size": hf.shared_expert_intermediate_size,
        "moe_shared_expert_gate": hf.shared_expert_gates > 0,
    }
    return (shared if hf.shared_expert_intermediate_size else {}) | {
        "num_moe_experts": hf.num_experts,
        "moe_ffn_hidden_size": hf.moe_intermediate_size,
        "moe_router_topk": hf.num_experts_per_tok,
        "moe_router_pre_softmax": not hf.norm_topk_prob,
        "moe_grouped_gemm": True,
        "moe_token_dispatcher_type": "alltoall",
        "moe_permute_fusion": True,
        "moe_router_load_balancing_type": "aux_loss",
        "moe_aux_loss_coeff": 0.001,
    }
