"""Hugging Face folders made of tensors, and what wrong conversions make of them."""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from iwopd_megatron.hf.config import parse_hf_config
from iwopd_megatron.weights.sharding import QKV


def on_disk(folder: Path) -> dict[str, torch.Tensor]:
    files = sorted(folder.glob("*.safetensors"))
    return {name: x for file in files for name, x in load_file(file).items()}


def random_bits(tensors: dict, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Every bit pattern, NaNs with payloads too: a cast or any arithmetic would show."""
    generator = torch.Generator().manual_seed(3)
    return {
        name: torch.randint(
            0, 256, (*x.shape, dtype.itemsize), generator=generator, dtype=torch.uint8
        )
        .view(dtype)
        .squeeze(-1)
        for name, x in tensors.items()
    }


def write_folder(folder: Path, template: Path, tensors: dict, files: int = 1) -> Path:
    """A Hugging Face folder whose tensors are dealt to `files` files like cards."""
    folder.mkdir()
    for file in template.iterdir():
        if file.suffix == ".json" and "index" not in file.name:
            shutil.copy(file, folder / file.name)
    if files == 1:
        save_file(tensors, folder / "model.safetensors")
        return folder
    weight_map = {}
    for i in range(files):
        part = dict(list(tensors.items())[i::files])
        name = f"model-{i + 1:05d}-of-{files:05d}.safetensors"
        save_file(part, folder / name)
        weight_map |= dict.fromkeys(part, name)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


# What a wrong conversion makes of a folder's tensors or config.


def unpermuted(tensors: dict, config: dict) -> None:
    names = [f"model.layers.1.self_attn.{x}_proj.weight" for x in "qkv"]
    sources = [tensors[name] for name in names]
    whole = QKV.shard(sources, 0, 1, parse_hf_config(config, "config.json"))
    parts = whole.split([len(x) for x in sources])
    tensors.update(zip(names, (x.clone() for x in parts), strict=True))


def swapped_gate(tensors: dict, config: dict) -> None:
    _swap(tensors, *(f"model.layers.2.mlp.experts.3.{x}_proj.weight" for x in ("gate", "up")))


def exchanged_experts(tensors: dict, config: dict) -> None:
    for x in ("gate", "up", "down"):
        _swap(tensors, *(f"model.layers.0.mlp.experts.{e}.{x}_proj.weight" for e in (1, 6)))


def padded_vocabulary(tensors: dict, config: dict) -> None:
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = torch.cat([tensors[name], torch.zeros(16, 64)])


def other_epsilon(tensors: dict, config: dict) -> None:
    config["rms_norm_eps"] = 1e-5


def one_bit(tensors: dict, config: dict) -> None:
    tensors["model.norm.weight"].view(torch.int32)[5] ^= 1


def lost_norm(tensors: dict, config: dict) -> None:
    del tensors["model.layers.3.self_attn.k_norm.weight"]


def _swap(tensors: dict, a: str, b: str) -> None:
    tensors[a], tensors[b] = tensors[b], tensors[a]
