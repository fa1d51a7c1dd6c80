"""The typed description of a model (`HfConfig`), made from its config.json; every room reads it.

Where config.json says a thing twice, transformers' choice holds (configuration_utils.py,
modeling_rope_utils.py and the models' configuration files, 5.23.0). Imports no torch.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from iwopd_megatron.errors import RecipeError
from iwopd_megatron.files.typed_json import TypedJson
from iwopd_megatron.hf.families import FAMILIES
from iwopd_megatron.hf.families.family import Family
from iwopd_megatron.hf.quantization import Quantization, read_quantization
from iwopd_megatron.hf.rope import Rope, read_rope

DTYPES = ("float32", "bfloat16", "float16", "float64")


@dataclass(frozen=True)
class HfConfig:
    """What config.json says of the mathematics, under Hugging Face's names.

    A dense model has `num_experts` 0, and 0 in the other fields of experts.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    max_position_embeddings: int
    rope: Rope
    tie_word_embeddings: bool = False
    qk_norm: bool = False  # a norm on every head's queries and keys
    qkv_bias: bool = False
    attention_window: int = 0  # tokens that a token sees, itself included; 0: all before it
    num_experts: int = 0
    moe_intermediate_size: int = 0
    num_experts_per_tok: int = 0
    norm_topk_prob: bool = False
    shared_expert_intermediate_size: int = 0  # of the expert that every token meets; 0: none
    shared_expert_gates: int = 0  # numbers a token that scale its output: 1 or none
    first_k_dense_replace: int = 0  # layers at the beginning without experts
    sigmoid_router: bool = False  # scores are sigmoids; a bias that is not trained helps to choose
    routed_scaling_factor: float = 1.0
    n_group: int = 1  # of experts, of which a token's are in the best `topk_group`
    topk_group: int = 1
    pad_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()  # of config.json; `folder.eos_ids` has the last word
    dtype: str = "float32"  # as torch names it
    quantization: Quantization | None = None  # how the folder's weights are stored, if not plainly

    @property
    def ffn_size(self) -> int:
        """Width of a dense MLP, or of one expert."""
        return self.moe_intermediate_size if self.num_experts else self.intermediate_size

    @property
    def family(self) -> Family:
        """What the package knows of its model type."""
        return FAMILIES[self.model_type]

    def has_experts(self, layer: int) -> bool:
        """Return whether a layer, counted from 0, has experts and no dense MLP."""
        return self.num_experts > 0 and layer >= self.first_k_dense_replace

    @property
    def rotary_dim(self) -> int:
        """How much of a head is turned by rotary positions."""
        return int(self.head_dim * self.rope.partial_rotary_factor)

    @property
    def queries(self) -> int:
        """Rows of the query projection."""
        return self.num_attention_heads * self.head_dim

    @property
    def keys(self) -> int:
        """Rows of the key projection, and of the value projection."""
        return self.num_key_value_heads * self.head_dim

    @property
    def has_head(self) -> bool:
        """Whether the LM head is a tensor of its own."""
        return not self.tie_word_embeddings

    @property
    def context_length(self) -> int:
        """Longest sequence in tokens: YaRN stretches the original context by its factor.

        Within its attention window every token sees all before it, which is what is implemented.
        """
        longest = self.max_position_embeddings
        if self.rope.kind == "yarn":
            longest = max(longest, int(self.rope.original_positions * self.rope.factor))
        return min(longest, self.attention_window or longest)


def read_hf_config(folder: Path) -> HfConfig:
    """Read config.json of a Hugging Face folder; RecipeError says what is missing or unfit."""
    return parse_hf_config(read_json(folder, "config.json"), folder / "config.json")


def read_json(folder: Path, name: str) -> dict[str, Any]:
    """Read a JSON object of a model folder; RecipeError where there is none."""
    if not folder.is_dir():
        raise RecipeError(
            f"folder {folder} does not exist; point it at a Hugging Face model folder."
        )
    file = folder / name
    if not file.is_file():
        raise RecipeError(f"{folder} has no {name}; it is not a Hugging Face model folder.")
    try:
        content = json.loads(file.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise RecipeError(f"{file} is not valid JSON: {error}.") from None
    except OSError as error:
        raise RecipeError(f"{file} cannot be read: {error.strerror}.") from None
    if not isinstance(content, dict):
        raise RecipeError(f"{file} holds a {type(content).__name__}, not an object.")
    return content


def parse_hf_config(content: dict[str, Any], file: Path | str) -> HfConfig:
    """Describe the model of a config.json's content; `file` names it in the errors."""
    config = TypedJson(content, file)
    model_type = content.get("model_type")
    family = FAMILIES.get(model_type) if isinstance(model_type, str) else None
    if family is None:
        raise RecipeError(
            f"{file}: model_type {model_type!r} is not supported; use one of {', '.join(FAMILIES)}."
        )
    for key, supported in family.fixed.items():
        value = content.get(key, supported)
        if value != supported and not (value is None and key in family.null_means_default):
            raise RecipeError(
                f"{file}: {key}={value!r} is not supported; only {supported!r} is, "
                f"which every published {family.transformers} model has."
            )
    _check_layer_types(config)
    positions = config.count("max_position_embeddings")
    fields: dict[str, Any] = dict(
        model_type=family.model_type,
        vocab_size=config.count("vocab_size"),
        hidden_size=config.count("hidden_size"),
        intermediate_size=config.count("intermediate_size"),
        num_hidden_layers=config.count("num_hidden_layers"),
        num_attention_heads=config.count("num_attention_heads"),
        rms_norm_eps=config.number("rms_norm_eps"),
        max_position_embeddings=positions,
        rope=read_rope(content, positions, file, family.partial_rotary),
        tie_word_embeddings=config.flag("tie_word_embeddings", False),
        pad_token_id=_pad_id(config),
        eos_token_ids=config.ids("eos_token_id"),
        dtype=_dtype(content, file),
        quantization=read_quantization(content, file),
    )
    found = HfConfig(**fields | family.describe(config))
    _check_sizes(found, file)
    return found


def _check_layer_types(config: TypedJson) -> None:
    """Refuse layers that do not attend to all earlier positions."""
    types = config.content.get("layer_types")
    layers = config.count("num_hidden_layers")
    if types is not None and types != ["full_attention"] * layers:
        raise RecipeError(
            f"{config.file}: layer_types must be 'full_attention' for each of its {layers} layers; "
            "sliding windows are not supported."
        )


def _dtype(content: dict[str, Any], file: Path | str) -> str:
    """Return the dtype's name: transformers 5 writes dtype, 4 wrote torch_dtype."""
    found = content.get("dtype") or content.get("torch_dtype") or "float32"
    if found not in DTYPES:
        raise RecipeError(f"{file}: dtype={found!r} must be one of {', '.join(DTYPES)}.")
    return found


def _pad_id(config: TypedJson) -> int | None:
    """Return the pad token's id; None where config.json names none."""
    found = config.ids("pad_token_id")
    if len(found) > 1:
        raise RecipeError(f"{config.file}: pad_token_id={list(found)} must be one id.")
    return found[0] if found else None


def _check_sizes(hf: HfConfig, file: Path | str) -> None:
    """Refuse sizes that contradict each other, and special ids outside the vocabulary."""
    if hf.num_attention_heads % hf.num_key_value_heads:
        raise RecipeError(
            f"{file}: num_key_value_heads={hf.num_key_value_heads} does not divide "
            f"num_attention_heads={hf.num_attention_heads}; copy the model's original config.json."
        )
    if hf.head_dim % 2 or hf.rotary_dim % 2 or not hf.rotary_dim:
        part = f" times partial_rotary_factor={hf.rope.partial_rotary_factor:g}"
        raise RecipeError(
            f"{file}: head_dim={hf.head_dim}{part * (hf.rotary_dim < hf.head_dim)} must be even, "
            "for rotary positions."
        )
    if hf.num_experts_per_tok > hf.num_experts:
        raise RecipeError(
            f"{file}: num_experts_per_tok={hf.num_experts_per_tok} exceeds the "
            f"{hf.num_experts} experts; copy the model's original config.json."
        )
    pad = () if hf.pad_token_id is None else (hf.pad_token_id,)
    for key, ids in (("pad_token_id", pad), ("eos_token_id", hf.eos_token_ids)):
        if any(token >= hf.vocab_size for token in ids):
            raise RecipeError(
                f"{file}: {key} {max(ids)} is not below vocab_size={hf.vocab_size}; "
                "copy the model's original config.json."
            )
