"""Model folders with FP8 weights and scales, and their twins with plain weights, by hand."""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from iwopd_megatron.hf.families import FAMILIES
from iwopd_megatron.parity.rehearse import write_model

LARGEST = 448.0  # of float8_e4m3fn
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
PROJECTIONS += ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj")  # with latents
# No multiple of 128, most of more than one block: 152 rows of the projection to a latent.
LATENTS = {"hidden_size": 192, "intermediate_size": 200, "q_lora_rank": 136, "kv_lora_rank": 144}
FP8_CONFIG = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic"}


def compressed_tensors_config(**weights) -> dict:
    """What compressed-tensors writes for dynamic FP8 activations."""
    args = {"num_bits": 8, "type": "float", "symmetric": True, "dynamic": False} | weights
    inputs = {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True}
    group = {"targets": ["Linear"], "weights": args, "input_activations": inputs}
    return {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }


def quantise(weight: torch.Tensor, block: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """(FP8 values, fp32 scales), one scale a block of rows and columns; the last may be smaller."""
    rows, columns = weight.shape
    scale = torch.zeros(-(-rows // block[0]), -(-columns // block[1]))
    values = torch.zeros(rows, columns, dtype=torch.float8_e4m3fn)
    for i in range(scale.shape[0]):
        for j in range(scale.shape[1]):
            part = (
                slice(i * block[0], (i + 1) * block[0]),
                slice(j * block[1], (j + 1) * block[1]),
            )
            scale[i, j] = weight[part].abs().max() / LARGEST
            values[part] = (weight[part] / scale[i, j]).to(torch.float8_e4m3fn)
    return values, scale


def multiply(values: torch.Tensor, scale: torch.Tensor, block: tuple[int, int]) -> torch.Tensor:
    """The plain weight, one block at a time."""
    out = values.float()
    for i in range(scale.shape[0]):
        for j in range(scale.shape[1]):
            out[i * block[0] : (i + 1) * block[0], j * block[1] : (j + 1) * block[1]] *= scale[i, j]
    return out


def write_scaled(
    source: Path,
    folder: Path,
    twin: Path,
    block: tuple[int, int],
    settings: dict,
    name: str = "weight_scale_inv",
    scale_dtype: torch.dtype = torch.float32,
) -> None:
    """Write `source` with scaled projections to `folder`, and the same weights plainly to `twin`.

    A size of 0 in `block` means all rows or columns there are.
    """
    for place in (folder, twin):
        shutil.copytree(source, place, ignore=shutil.ignore_patterns("*.safetensors*"))
    scaled, plain = {}, {}
    for key, weight in load_file(source / "model.safetensors").items():
        scaled[key] = plain[key] = weight
        if key.split(".")[-2] in PROJECTIONS:
            own = tuple(size or whole for size, whole in zip(block, weight.shape, strict=True))
            values, scale = quantise(weight.float(), own)
            scale = scale.to(scale_dtype)
            scaled[key], scaled[key.removesuffix("weight") + name] = values, scale
            plain[key] = multiply(values, scale.float(), own)
    save_file(scaled, folder / "model.safetensors", metadata={"format": "pt"})
    save_file(plain, twin / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    text = json.dumps(config | {"quantization_config": settings})
    (folder / "config.json").write_text(text)


def write_latents(folder: Path) -> Path:
    """A small DeepSeek-V3 with plain weights."""
    settings = dict(FAMILIES["deepseek_v3"].sample) | LATENTS
    write_model(folder, settings | {"model_type": "deepseek_v3", "tie_word_embeddings": False})
    return folder


def add_layer_after_last(folder: Path) -> None:
    """The layer of multi-token prediction, numbered after the last, 3, and scaled as it."""
    tensors = load_file(folder / "model.safetensors")
    last = {name: x for name, x in tensors.items() if name.startswith("model.layers.3.")}
    ahead = {name.replace("layers.3.", "layers.4."): x.clone() for name, x in last.items()}
    save_file(tensors | ahead, folder / "model.safetensors", metadata={"format": "pt"})
