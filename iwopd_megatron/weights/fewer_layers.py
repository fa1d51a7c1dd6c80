"""config.json of a model that has lost some of its layers, for any family that numbers them.

Known settings are shortened or renumbered; settings that look as if they counted layers and are
not known are refused. What a family derives for a layer from its number where config.json says
nothing (transformers fills it in) is written down, so that every layer stays what it was.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from iwopd_megatron.errors import RecipeError
from iwopd_megatron.files.typed_json import TypedJson

LISTS = (  # a value for every layer
    "layer_types",
    "layers_block_type",
    "mlp_layer_types",
    "moe_layer_freq",
    "no_rope_layers",
)
NUMBERS = ("mlp_only_layers", "moe_layers")  # numbers of some layers
FIRST = ("first_k_dense_replace", "max_window_layers")  # how many of the first layers are alike
PERIODS = {  # every so many layers, and the list that wins where there is one
    "decoder_sparse_step": "",
    "full_attention_interval": "layer_types",
    "interleave_moe_layer_step": "moe_layers",
    "moe_layer_freq": "",
    "no_rope_layer_interval": "no_rope_layers",
    "sliding_window_pattern": "layer_types",
    "_sliding_window_pattern": "layer_types",
}
PLAIN_LISTS = ("architectures", "eos_token_id")  # may have as many values as there are layers
CANNOT = "layers of this model cannot be dropped"
SUSPECT = re.compile(r"layer(?!_?norm|_?drop|_?scale)|block|interval|period|pattern|mtp|nextn")
NAMED = re.compile(r"(\blayers\.)(\d+)(?=\.|$)")


def count_layers(content: dict[str, Any], file: Path) -> int:
    """Return how many layers a config.json's content says there are; RecipeError if it does not."""
    if "num_hidden_layers" not in content:
        raise RecipeError(
            f"{file} has no num_hidden_layers of its own; only a model of one stack of layers can "
            "lose some of them."
        )
    return TypedJson(content, file).count("num_hidden_layers")


def without_layers(content: dict[str, Any], dropped: set[int], file: Path) -> dict[str, Any]:
    """Return config.json's content for the layers that are left, which are numbered anew.

    RecipeError where a setting may say something of layers that is not known; `file` names it.
    """
    layers = count_layers(content, file)
    number = {old: new for new, old in enumerate(x for x in range(layers) if x not in dropped)}
    said = {key: value for key, value in content.items() if value is not None}
    full = _filled_up(content, file) | said
    found = {key: _setting(key, full, layers, number, file) for key in full}
    new = {key: _renamed(found[key], number, f"{file}: {key}") for key in said}
    new = {key: new.get(key) for key in content}
    filled = _filled_up(new, file)
    new |= {key: x for key, x in found.items() if key not in said and filled.get(key) != x}
    filled = _filled_up(new, file)
    wrong = [key for key, x in found.items() if key not in said and filled.get(key) != x]
    if wrong:
        raise RecipeError(
            f"{file}: {wrong[0]} follows from the numbers of layers whatever config.json says; "
            f"{CANNOT}."
        )
    return new


def _setting(
    key: str, content: dict[str, Any], layers: int, number: dict[int, int], file: Path
) -> Any:
    """Return one setting's value for the layers in `number`, old -> new."""
    value = content[key]
    if key == "num_hidden_layers":
        return len(number)
    if key in LISTS and isinstance(value, list) and value:
        if len(value) != layers:
            raise RecipeError(
                f"{file}: {key} has {len(value)} values for {layers} layers; copy the model's "
                "original config.json."
            )
        return [value[layer] for layer in number]
    if key in NUMBERS and isinstance(value, list):
        return [number[layer] for layer in value if layer in number]
    is_count = isinstance(value, int) and not isinstance(value, bool)
    if key in FIRST and is_count:
        return sum(layer < value for layer in number)
    is_alike = key in PERIODS and (value == 1 or bool(content.get(PERIODS[key])))
    if is_alike or not value or isinstance(value, (bool, str)):
        return value
    is_list = isinstance(value, list) and len(value) == layers and key not in PLAIN_LISTS
    if key in PERIODS or SUSPECT.search(key) or is_list:
        raise RecipeError(
            f"{file}: {key}={str(value)[:60]} may depend on the numbers of layers, and how is not "
            f"known; {CANNOT}."
        )
    return value


def _renamed(value: Any, number: dict[int, int], where: str) -> Any:
    """Return a value with the names of layers' modules in it, as in quantization_config, anew."""
    if isinstance(value, dict):
        return {key: _renamed(part, number, where) for key, part in value.items()}
    if isinstance(value, list):
        return [_renamed(part, number, where) for part in value if not _is_gone(part, number)]
    if not isinstance(value, str) or "layers" not in value:
        return value
    if value.startswith("re:") and re.search(r"\d", value):
        raise RecipeError(
            f"{where} has the pattern {value!r:.80}, which may name layers by number; {CANNOT}."
        )
    return NAMED.sub(lambda match: f"{match[1]}{number.get(int(match[2]), match[2])}", value)


def _is_gone(value: Any, number: dict[int, int]) -> bool:
    """Return whether a text names a module of a layer that is dropped."""
    named = NAMED.search(value) if isinstance(value, str) else None
    return named is not None and int(named[2]) not in number


def _filled_up(content: dict[str, Any], file: Path) -> dict[str, Any]:
    """Return a config.json's content with the defaults of its family."""
    from transformers import CONFIG_MAPPING

    model_type = content.get("model_type")
    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
        raise RecipeError(
            f"{file}: model_type {model_type!r} is none that transformers knows; {CANNOT}."
        )
    try:
        found: dict[str, Any] = CONFIG_MAPPING[model_type].from_dict(dict(content)).to_dict()
    except Exception as error:  # whatever a family's own checks raise
        words = " ".join(str(error).split())[:200].rstrip(".") or type(error).__name__
        raise RecipeError(
            f"{file} is refused by transformers ({words}); copy the model's original config.json."
        ) from None
    return found
