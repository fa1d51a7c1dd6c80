"""Model folders whose weights are zeros: fit to be opened and checked, not to be computed with."""

import json
from functools import cache
from pathlib import Path

import torch
from safetensors.torch import save

from iwopd_megatron.hf.config import parse_hf_config
from iwopd_megatron.hf.shapes import hf_names, hf_shape


def write_zeros(folder: Path, config: dict) -> Path:
    """Write config.json, an empty tokenizer and the weights that the config implies."""
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(config)
    (folder / "config.json").write_text(text)
    (folder / "tokenizer.json").touch()
    (folder / "model.safetensors").write_bytes(_zeros(text))
    return folder


@cache
def _zeros(text: str) -> bytes:
    hf = parse_hf_config(json.loads(text), "config.json")
    return save({n: torch.zeros(hf_shape(n, hf), dtype=torch.float16) for n in hf_names(hf)})
