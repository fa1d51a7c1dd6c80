"""One thing changed in a good model folder: a config key, a tensor, a file, the tokenizer, EOS."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

Change = Callable[[Path], None]
MISSING = "(missing)"
ODD = st.sampled_from(
    [
        MISSING,
        None,
        0,
        1,
        -1,
        2,
        3,
        7,
        1e30,
        0.5,
        float("nan"),
        "x",
        "16",
        True,
        False,
        [],
        [0],
        [1, 15],
        [99],
        {},
        {"a": 1},
        2**31,
    ],
)
ROPE_KEYS = ("rope_type", "type", "rope_theta", "factor", "original_max_position_embeddings")
ROPES = st.sampled_from([
    {"rope_type": "linear", "factor": 2.0}, {"type": "linear", "factor": 2},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8},
    {"rope_type": "yarn", "factor": 4.0}, {"rope_type": "dynamic", "factor": 2.0},
    {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
     "original_max_position_embeddings": 8},
    {"rope_type": "default", "rope_theta": 50.0}, {"rope_type": "longrope"},
])  # fmt: skip
DTYPES = st.sampled_from(
    [
        torch.float64,
        torch.float32,
        torch.bfloat16,
        torch.float16,
        torch.float8_e4m3fn,
        torch.float8_e5m2,
        torch.int8,
        torch.uint8,
        torch.int32,
        torch.int64,
        torch.bool,
    ]
)
CONFIG_KEYS = (
    "model_type",
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "rms_norm_eps",
    "max_position_embeddings",
    "rope_theta",
    "tie_word_embeddings",
    "num_experts",
    "num_local_experts",
    "moe_intermediate_size",
    "num_experts_per_tok",
    "norm_topk_prob",
    "pad_token_id",
    "eos_token_id",
    "hidden_act",
    "attention_bias",
    "use_sliding_window",
    "mlp_only_layers",
    "decoder_sparse_step",
    "layer_types",
    "rope_parameters",
    "rope_scaling",
    "dtype",
    "torch_dtype",
    "quantization_config",
    "partial_rotary_factor",
    "architectures",
    "original_max_position_embeddings",
    "initializer_range",
    "use_cache",
    "bos_token_id",
)


def edit_json(file: Path, key: str, value: Any) -> None:
    content = json.loads(file.read_text()) if file.is_file() else {}
    if value == MISSING:
        content.pop(key, None)
    else:
        content[key] = value
    file.write_text(json.dumps(content))


def edit_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    for file in sorted(folder.glob("*.safetensors")):
        tensors = load_file(file)
        change(tensors)
        save_file({k: x.contiguous() for k, x in tensors.items()}, file, metadata={"format": "pt"})


def on_one(number: int, change: Callable[[dict, str], None]) -> Change:
    """A change of one tensor of every weight file."""

    def change_it(tensors: dict[str, torch.Tensor]) -> None:
        if tensors:
            change(tensors, sorted(tensors)[number % len(tensors)])

    return lambda folder: edit_tensors(folder, change_it)


def rope_key(key: str, value: Any) -> Change:
    def change(folder: Path) -> None:
        file = folder / "config.json"
        content = json.loads(file.read_text())
        rope = content.get("rope_parameters") or {}
        content["rope_parameters"] = (
            rope | {key: value} if value != MISSING else {k: v for k, v in rope.items() if k != key}
        )
        file.write_text(json.dumps(content))

    return change


def file_bytes(name: str, change: Callable[[bytes], bytes]) -> Change:
    def change_it(folder: Path) -> None:
        file = folder / name
        if file.is_file():
            file.write_bytes(change(file.read_bytes()))

    return change_it


def flipped(data: bytes, place: int) -> bytes:
    place %= max(1, len(data))
    return data[:place] + bytes([data[place] ^ 0x41]) + data[place + 1 :] if data else data


def stale_index(folder: Path) -> None:
    """An index beside the weights that names a file with others."""
    for file in sorted(folder.glob("*.safetensors"))[:1]:
        tensors = {k: (x.float() * 3).to(x.dtype) for k, x in load_file(file).items()}
        save_file(tensors, folder / "old.safetensors")
        weight_map = dict.fromkeys(tensors, "old.safetensors")
        text = json.dumps({"metadata": {}, "weight_map": weight_map})
        (folder / "model.safetensors.index.json").write_text(text)


def only_an_index(folder: Path) -> None:
    stale_index(folder)
    (folder / "model.safetensors").unlink(missing_ok=True)


def index_entry(value: Any) -> Change:
    def change(folder: Path) -> None:
        only_an_index(folder)
        file = folder / "model.safetensors.index.json"
        content = json.loads(file.read_text())
        content["weight_map"][min(content["weight_map"])] = value
        file.write_text(json.dumps(content))

    return change


def head(scale: float) -> Change:
    """A head in the file, whatever the config says of it."""

    def change(tensors: dict[str, torch.Tensor]) -> None:
        embedding = tensors.get("model.embed_tokens.weight")
        if embedding is not None:
            tensors["lm_head.weight"] = embedding.clone() * scale

    return lambda folder: edit_tensors(folder, change)


def recast(dtype: torch.dtype) -> Callable[[dict, str], None]:
    return lambda tensors, name: tensors.update({name: tensors[name].to(dtype)})


def reshaped(how: str) -> Callable[[dict, str], None]:
    def change(tensors: dict, name: str) -> None:
        x = tensors[name]
        tensors[name] = {
            "transposed": x.t() if x.dim() == 2 else x,
            "shorter": x[:-1],
            "flat": x.flatten(),
            "deeper": x[None],
            "empty": x[:0],
            "one": x.flatten()[0],
        }[how].clone()

    return change


FILES = st.sampled_from(
    [
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "model.safetensors",
        "model.safetensors.index.json",
    ]
)
NUMBER = st.integers(0, 10_000)
CHANGES: dict[str, st.SearchStrategy[Change]] = {
    "config": st.tuples(st.sampled_from(CONFIG_KEYS), ODD).map(
        lambda x: lambda folder: edit_json(folder / "config.json", *x)
    ),
    "rope": st.one_of(
        st.tuples(st.sampled_from(["rope_scaling", "rope_parameters"]), ROPES).map(
            lambda x: lambda folder: edit_json(folder / "config.json", *x)
        ),
        st.builds(rope_key, st.sampled_from(ROPE_KEYS), ODD),
    ),
    "dtype": st.builds(lambda n, d: on_one(n, recast(d)), NUMBER, DTYPES),
    "all dtypes": st.builds(
        lambda d: (
            lambda folder: edit_tensors(
                folder, lambda t: t.update({k: x.to(d) for k, x in t.items()})
            )
        ),
        DTYPES,
    ),
    "tensor": st.one_of(
        st.builds(lambda n: on_one(n, lambda t, name: t.pop(name)), NUMBER),
        st.builds(lambda n: on_one(n, lambda t, name: t.update({name + "x": t.pop(name)})), NUMBER),
        st.builds(lambda n: on_one(n, lambda t, name: t.update(extra=t[name].clone())), NUMBER),
        st.builds(head, st.sampled_from([1.0, 2.0])),
    ),
    "shape": st.builds(
        lambda n, how: on_one(n, reshaped(how)),
        NUMBER,
        st.sampled_from(["transposed", "shorter", "flat", "deeper", "empty", "one"]),
    ),
    "file": st.one_of(
        st.builds(lambda f: lambda folder: (folder / f).unlink(missing_ok=True), FILES),
        st.builds(lambda f, n: file_bytes(f, lambda d: d[: n % (len(d) + 1)]), FILES, NUMBER),
        st.builds(lambda f, n: file_bytes(f, lambda d: flipped(d, n)), FILES, NUMBER),
        st.builds(lambda f: file_bytes(f, lambda d: d + b"\n{}"), FILES),
        st.builds(lambda f: file_bytes(f, lambda d: b"\xef\xbb\xbf" + d), FILES),
        st.just(lambda folder: (folder / "adapter_config.json").write_text("{}")),
    ),
    "index": st.one_of(
        st.just(stale_index),
        st.just(only_an_index),
        st.builds(index_entry, st.sampled_from(["none.safetensors", 3, None, "../x", ""])),
    ),
    "tokenizer": st.builds(
        lambda key, value: lambda folder: edit_json(folder / "tokenizer_config.json", key, value),
        st.sampled_from(["eos_token", "pad_token", "tokenizer_class", "chat_template"]),
        st.sampled_from(
            [
                MISSING,
                None,
                "<pad>",
                "<unused>",
                "a",
                "<new>",
                3,
                "{% for m in messages %}{{ m['content'] }}<eos>{% endfor %}",
                "{{ x(",
            ]
        ),
    ),
    "eos": st.builds(
        lambda file, value: lambda folder: edit_json(folder / file, "eos_token_id", value),
        st.sampled_from(["config.json", "generation_config.json"]),
        ODD,
    ),
}
