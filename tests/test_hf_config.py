"""config.json is read as transformers reads it, or refused in one sentence."""

import importlib
import json

import pytest
import torch
from transformers import AutoConfig

from iwopd_megatron.errors import RecipeError
from iwopd_megatron.hf.config import parse_hf_config, read_hf_config
from iwopd_megatron.models.rotary import inverse_frequencies, turn

DENSE = dict(
    model_type="qwen3",
    vocab_size=64,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
    rms_norm_eps=1e-6,
    max_position_embeddings=256,
    rope_theta=1e6,
)
MOE = DENSE | dict(
    model_type="qwen3_moe",
    moe_intermediate_size=32,
    num_experts_per_tok=2,
    norm_topk_prob=True,
    num_experts=4,
)
# of Llama's line: what its families may leave out
LLAMA = {key: value for key, value in DENSE.items() if key != "head_dim"} | {"model_type": "llama"}
BASES = {"qwen3_moe": MOE, "qwen3": DENSE} | {
    name: LLAMA | {"model_type": name} for name in ("llama", "qwen2", "mistral")
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
DEFAULT = {"rope_type": "default", "rope_theta": 1e4}
NOTHING = object()  # a key that is left out

# what changes in MOE (or DENSE, by model_type)
READ = {
    "plain": {},
    "parameters beside a left-over theta": {"rope_parameters": DEFAULT},
    "parameters alone": {"rope_theta": NOTHING, "rope_parameters": DEFAULT},
    "scaling alone, of type default": {"rope_theta": NOTHING, "rope_scaling": DEFAULT},
    "scaling beside parameters": {"rope_parameters": DEFAULT, "rope_scaling": YARN},
    "scaling without theta beside parameters with it": {
        "rope_theta": NOTHING, "rope_parameters": DEFAULT, "rope_scaling": YARN},
    "empty scaling": {"rope_parameters": DEFAULT, "rope_scaling": {}},
    "null scaling": {"rope_parameters": YARN, "rope_scaling": None},
    "no theta at all": {"rope_theta": NOTHING},
    "older name of the type": {"rope_scaling": {"type": "linear", "factor": 4}},
    "both names of the type": {"rope_scaling": YARN | {"type": "linear"}},
    "yarn": {"rope_scaling": YARN},
    "yarn with theta inside": {"rope_parameters": YARN | {"rope_theta": 500.0}},
    "yarn without an original context": {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
    "yarn, original context outside": {
        "rope_scaling": YARN, "original_max_position_embeddings": 128},
    "yarn without a factor": {"rope_scaling": YARN | {"factor": None}},
    "yarn, attention factor": {"rope_scaling": YARN | {"attention_factor": 1.3}},
    "yarn, mscale": {"rope_scaling": YARN | {"mscale": 1.0, "mscale_all_dim": 0.8}},
    "yarn, betas": {"rope_scaling": YARN | {"beta_fast": 16, "beta_slow": 2}},
    "yarn, not truncated": {"rope_scaling": YARN | {"truncate": False}},
    "yarn that stretches nothing": {"rope_scaling": YARN | {"factor": 1.0}},
    "llama3": {"rope_scaling": LLAMA3},
    "llama3 of a long context": {
        "rope_scaling": LLAMA3 | {"original_max_position_embeddings": 8192}},
    "unread keys": {"rope_scaling": {"rope_type": "default", "mrope_section": [8, 4, 4]}},
    "both names of the experts": {"num_local_experts": 8},
    "newer name of the experts": {"num_experts": NOTHING, "num_local_experts": 8},
    "no head size": {"head_dim": NOTHING},
    "dense": {"model_type": "qwen3"},
    "dense, null key-value heads": {"model_type": "qwen3", "num_key_value_heads": None},
    "dense with a left-over of experts": {"model_type": "qwen3", "num_experts": 4},
    "tied": {"tie_word_embeddings": True},
    "a list of EOS ids": {"eos_token_id": [1, 2]},
    "null pad token": {"pad_token_id": None},
    "null list of dense layers": {"mlp_only_layers": None},
    "layer types": {"model_type": "qwen3", "layer_types": ["full_attention"] * 2},
    "older name of the dtype": {"torch_dtype": "bfloat16"},
    "llama": {"model_type": "llama"},
    "llama, null heads": {"model_type": "llama", "num_key_value_heads": None, "head_dim": None},
    "llama, no key-value heads": {"model_type": "llama", "num_key_value_heads": NOTHING},
    "llama, heads of another size": {"model_type": "llama", "head_dim": 32},
    "llama, null EOS id": {"model_type": "llama", "eos_token_id": None},
    "llama, scaled": {"model_type": "llama", "rope_scaling": LLAMA3},
    "llama, what a release has besides": {
        "model_type": "llama", "pretraining_tp": 1, "mlp_bias": False, "rope_scaling": None,
        "is_llama_config": True, "rope_interleaved": False, "bos_token_id": 1},
    "qwen2": {"model_type": "qwen2", "use_sliding_window": False, "sliding_window": 131072,
              "max_window_layers": 21, "num_key_value_heads": None},
    "mistral": {"model_type": "mistral"},
    "mistral, no window, its own head size": {
        "model_type": "mistral", "sliding_window": None, "head_dim": 32},
}  # fmt: skip


def config_of(change):
    base = BASES.get(change.get("model_type", "qwen3_moe"), MOE)
    return {key: value for key, value in {**base, **change}.items() if value is not NOTHING}


@pytest.fixture
def folder(tmp_path):
    def write(change):
        (tmp_path / "config.json").write_text(json.dumps(config_of(change)))
        return tmp_path

    return write


@pytest.mark.parametrize("case", READ)
def test_as_transformers_reads_it(folder, case):
    place = folder(READ[case])
    ours, theirs = read_hf_config(place), AutoConfig.from_pretrained(place)
    is_moe = ours.num_experts > 0
    for key in ("vocab_size", "num_key_value_heads", "tie_word_embeddings", "pad_token_id"):
        assert getattr(ours, key) == getattr(theirs, key), key
    assert ours.num_experts == (theirs.num_experts if is_moe else 0)
    eos = theirs.eos_token_id
    eos = () if eos is None else tuple(eos) if isinstance(eos, list) else (eos,)
    assert ours.eos_token_ids == eos
    window = None if ours.model_type == "qwen2" else getattr(theirs, "sliding_window", None)
    assert ours.attention_window == (window or 0)
    assert ours.dtype == str(theirs.dtype or "torch.float32").removeprefix("torch.")
    head = getattr(theirs, "head_dim", None) or theirs.hidden_size // theirs.num_attention_heads
    assert ours.head_dim == head
    name = ours.family.transformers
    module = importlib.import_module(
        f"transformers.models.{ours.model_type}.modeling_{ours.model_type}"
    )
    rotary = getattr(module, f"{name}RotaryEmbedding")(theirs)
    found = inverse_frequencies(ours.rope, head, torch.device("cpu"))
    torch.testing.assert_close(found, rotary.inv_freq, rtol=5e-7, atol=0)
    places = torch.arange(100)[None]
    cos, sin = turn(places[..., None] * rotary.inv_freq, ours.rope, torch.float32)
    expected = rotary(torch.zeros(1), places)
    torch.testing.assert_close((cos, sin), tuple(x[..., : head // 2] for x in expected))


REFUSED = {
    "attention_bias=True is not supported": {"model_type": "llama", "attention_bias": True},
    "mlp_bias=True is not supported": {"model_type": "llama", "mlp_bias": True},
    "num_attention_heads=5 does not divide hidden_size=64": {
        "model_type": "llama", "num_attention_heads": 5, "num_key_value_heads": 5, "head_dim": 8},
    "use_sliding_window=True is not supported": {
        "model_type": "qwen2", "use_sliding_window": True},
    "sliding_window='4096' must be": {"model_type": "mistral", "sliding_window": "4096"},
    "rope_type 'dynamic' is not supported": {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
    "rope_type 'longrope' is not supported": {"rope_parameters": {"rope_type": "longrope"}},
    "rope_scaling lacks 'factor'": {"rope_scaling": {"type": "linear"}},
    "rope_scaling lacks 'low_freq_factor'": {
        "rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
    "rope_theta='1e4' must be a number": {"rope_theta": "1e4"},
    "rope_parameters: rope_theta=None must be": {"rope_parameters": {"rope_theta": None}},
    "own for 'full_attention'": {
        "model_type": "qwen3", "rope_parameters": {"full_attention": DEFAULT}},
    "partial_rotary_factor is not supported": {"partial_rotary_factor": 0.5},
    "rope_parameters=[1] must be an object": {"rope_parameters": [1]},
    "num_experts=None must be a whole number": {"num_experts": None},
    "num_experts=0 must be a whole number": {"num_experts": 0},
    "num_experts_per_tok=9 exceeds the 4 experts": {"num_experts_per_tok": 9},
    "hidden_size='64' must be a whole number": {"hidden_size": "64"},
    "hidden_size=64.0 must be a whole number": {"hidden_size": 64.0},
    "num_hidden_layers=-1 must be": {"num_hidden_layers": -1},
    "vocab_size=True must be": {"vocab_size": True},
    "tie_word_embeddings='false' must be true or false": {"tie_word_embeddings": "false"},
    "tie_word_embeddings=None must be true or false": {"tie_word_embeddings": None},
    "head_dim=None must be": {"model_type": "qwen3", "head_dim": None},
    "head_dim=None must be a whole number": {"head_dim": None},
    "lacks 'head_dim'": {"model_type": "qwen3", "head_dim": NOTHING},
    "num_key_value_heads=None must be": {"num_key_value_heads": None},
    "num_key_value_heads=3 does not divide": {"num_key_value_heads": 3},
    "head_dim=15 must be even": {"head_dim": 15},
    "eos_token_id='1' must be a token id": {"eos_token_id": "1"},
    "eos_token_id 64 is not below vocab_size=64": {"eos_token_id": [1, 64]},
    "pad_token_id 99 is not below": {"pad_token_id": 99},
    "layer_types must be": {"model_type": "qwen3", "layer_types": ["sliding_attention"] * 2},
    "decoder_sparse_step=2 is not supported": {"decoder_sparse_step": 2},
    "transformers_weights='x.safetensors' is not": {"transformers_weights": "x.safetensors"},
    "model_type 'gptj' is not supported; use one of qwen3, ": {"model_type": "gptj"},
    "model_type None is not supported": {"model_type": NOTHING},
    "dtype='float8' must be one of": {"dtype": "float8"},
    "rms_norm_eps=nan must be": {"rms_norm_eps": float("nan")},
    "quantization_config: quant_method 'awq' is not": {
        "quantization_config": {"quant_method": "awq"}},
    "quantization_config: quant_method None is not": {"quantization_config": {"bits": 4}},
    "quantization_config='fp8' must be an object": {"quantization_config": "fp8"},
}  # fmt: skip


@pytest.mark.parametrize("words", REFUSED)
def test_refused_in_one_sentence(folder, words):
    with pytest.raises(RecipeError) as error:
        read_hf_config(folder(REFUSED[words]))
    message = str(error.value)
    assert words in message and "config.json" in message
    assert "\n" not in message and message.endswith(".")


def test_yarn_stretches_the_context():
    assert parse_hf_config(MOE, "config.json").context_length == 256
    hf = parse_hf_config(MOE | {"rope_scaling": YARN | {"factor": 8.0}}, "config.json")
    assert hf.context_length == 512


@pytest.mark.parametrize("text", ["\ufeff{}", "[]", "{", "\x00", "[" * 100_000])
def test_files_that_are_no_object(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(RecipeError, match="config.json"):
        read_hf_config(tmp_path)


def test_a_window_bounds_the_context(folder):
    """Within it every token sees all before it; longer sequences are refused."""
    assert read_hf_config(folder({"model_type": "mistral"})).context_length == 256
    windowed = {"model_type": "mistral", "sliding_window": 100}
    assert read_hf_config(folder(windowed)).context_length == 100
