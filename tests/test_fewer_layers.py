"""config.json of a model without some layers: every setting that says something of layers."""

from pathlib import Path

import pytest
from transformers import AutoConfig

from iwopd_megatron.errors import RecipeError
from iwopd_megatron.weights.fewer_layers import without_layers

# Settings of config.json, and what becomes of them without layers 1 and 4 of six.
BASE = {"num_hidden_layers": 6}
SETTINGS = [
    ("qwen3", {"max_window_layers": 2}, {"max_window_layers": 1}),
    ("qwen3", {"max_window_layers": 6}, {"max_window_layers": 4}),
    ("qwen3", {"layer_types": None}, {"layer_types": None}),
    ("qwen3_moe", {"mlp_only_layers": [1, 3, 5]}, {"mlp_only_layers": [2, 3]}),
    ("qwen3_moe", {"mlp_only_layers": None}, {"mlp_only_layers": None}),
    ("qwen3_moe", {"decoder_sparse_step": 1}, {"decoder_sparse_step": 1}),
    ("gpt_oss", {}, {"layer_types": ["sliding_attention"] * 2 + ["full_attention"] * 2}),
    ("smollm3", {"no_rope_layers": [1, 1, 0, 1, 0, 1]}, {"no_rope_layers": [1, 0, 1, 1]}),
    (
        "deepseek_v3", {"num_mtp_layers": 0, "first_k_dense_replace": 3},
        {"first_k_dense_replace": 2},
    ),
    ("llama", {"eos_token_id": [1, 2, 3, 4, 5, 6]}, {"eos_token_id": [1, 2, 3, 4, 5, 6]}),
]  # fmt: skip


@pytest.mark.parametrize(("family", "given", "wanted"), SETTINGS)
def test_settings_of_layers(family, given, wanted):
    content = BASE | {"model_type": family} | given
    found = without_layers(content, {1, 4}, Path("config.json"))
    assert found["num_hidden_layers"] == 4
    assert {key: found[key] for key in wanted} == wanted
    AutoConfig.for_model(**found)


REFUSED = [
    ("qwen3_moe", {"decoder_sparse_step": 2}, "decoder_sparse_step=2 may depend on the numbers"),
    (
        "qwen3",
        {"layer_types": ["full_attention"] * 5},
        r"is refused by transformers \(.*num_hidden_layers. \(6\) must",
    ),
    ("llama", {"num_kv_shared_layers": 2}, "num_kv_shared_layers=2 may depend on the numbers"),
    ("llama", {"skips": [0, 1, 0, 1, 0, 1]}, "skips=.* may depend on the numbers of layers"),
    ("llama", {"mlp_layer_types": ["dense"] * 5}, "mlp_layer_types has 5 values for 6 layers"),
    ("unheard_of", {}, "model_type 'unheard_of' is none that transformers knows"),
    ("llama", {"num_hidden_layers": "6"}, "must be a whole number above 0"),
    (
        "llama",
        {"quantization_config": {"ignore": [r"re:model\.layers\.[0-3]\..*"]}},
        "has the pattern .* which may name layers by number",
    ),
]


@pytest.mark.parametrize(("family", "given", "sentence"), REFUSED)
def test_settings_that_are_not_known_to_be_right(family, given, sentence):
    with pytest.raises(RecipeError, match=f"config.json.*{sentence}"):
        without_layers(BASE | {"model_type": family} | given, {1, 4}, Path("config.json"))
