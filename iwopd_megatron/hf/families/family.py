"""What a family of models is, for every part of the package: one `Family`, in one file beside this.

    config.json -> HfConfig     `describe`, `fixed`, `null_means_default`
    tensors <-> parameters      `rows`
    planning without a folder   `published`
    parity and every test walk  `sample`

The modules that a model needs follow from what `describe` says of it (models/layer_specs.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from iwopd_megatron.files.typed_json import TypedJson
from iwopd_megatron.hf.families.rows import Row


@dataclass(frozen=True)
class Family:
    """A model type of config.json, and all that the package has to know of it.

    describe: a config.json's content -> the fields of `HfConfig` that the family has, or reads in
    its own way. fixed: settings of which one value is implemented, and which transformers takes
    where they are missing; of those in `null_means_default`, null is that value too.
    published: what config.json files of published models say about architecture, by folder name.
    partial_rotary: the share of a head that is turned where config.json names none; None: all of it
    is, whatever config.json says.
    predicts_ahead: its folders may have layers of multi-token prediction, numbered after the last,
    which are read past.
    sample: settings of a small random model in which every kind of weight matters.
    """

    model_type: str
    transformers: str  # its classes there: <name>Config, <name>ForCausalLM
    describe: Callable[[TypedJson], dict[str, Any]]
    rows: tuple[Row, ...]
    published: Mapping[str, Mapping[str, Any]]
    sample: Mapping[str, Any]
    fixed: Mapping[str, Any] = field(default_factory=dict)
    null_means_default: tuple[str, ...] = ()
    partial_rotary: float | None = None
    predicts_ahead: bool = False

    @property
    def has_experts(self) -> bool:
        """Whether its models have experts."""
        return "moe_intermediate_size" in self.sample


def heads_or_null(config: TypedJson) -> int:
    """Return the key-value heads; null and nothing mean as many as query heads."""
    if config.content.get("num_key_value_heads") is None:
        return config.count("num_attention_heads")
    return config.count("num_key_value_heads")


def head_dim_or_share(config: TypedJson) -> int:
    """Return a head's size; nothing means an equal share of the hidden size, null is an error."""
    has_own = "head_dim" in config.content
    return config.count("head_dim") if has_own else head_dim_or_null(config)


def head_dim_or_null(config: TypedJson) -> int:
    """Return a head's size; null and nothing mean an equal share of the hidden size."""
    if config.content.get("head_dim") is None:
        return config.count("hidden_size") // config.count("num_attention_heads")
    return config.count("head_dim")
