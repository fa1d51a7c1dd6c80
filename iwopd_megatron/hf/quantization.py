"""How a folder's weights are scaled, by `quantization_config`: FP8 by block, row, group or tensor.

A scaled weight W [out, in] is stored as F8_E4M3 beside its scales S: W = Q * S, each scale over
the block of its place. `quant_method: fp8` (released Qwen3 FP8 folders; transformers'
finegrained_fp8.py) names them `weight_scale_inv`, compressed-tensors `weight_scale`. Every other
method is refused by name. Imports no torch: `weights/scaled_tensors.py` reads them.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from iwopd_megatron.errors import RecipeError

SCALED = "F8_E4M3"
SCALE_DTYPES = ("F32", "BF16", "F16")
FORMATS = ("float-quantized", "naive-quantized")
Strategy = tuple[int | None, int | None]  # rows and columns that one scale is for; None: all
TENSOR, ROW = (None, None), (1, None)


@dataclass(frozen=True)
class Quantization:
    """How a folder's scaled weights are stored.

    `rounds_product`: compressed-tensors rounds Q * S to the scale's dtype before the model's.
    """

    method: str
    scale_name: str  # replaces `weight` in the tensor's name
    strategies: tuple[Strategy, ...]
    rounds_product: bool

    def scale_of(self, name: str) -> str:
        """Return the name of the tensor with a weight's scales."""
        return name.removesuffix("weight") + self.scale_name

    def block(self, shape: tuple[int, ...], scale: tuple[int, ...]) -> tuple[int, int] | None:
        """Return the rows and columns one scale is for; None if no strategy gives this shape."""
        for rows, columns in self.strategies:
            block = rows or shape[0], columns or shape[1]
            grid = -(-shape[0] // block[0]), -(-shape[1] // block[1])
            if scale == grid or ((rows, columns) == TENSOR and scale in ((), (1,))):
                return block
        return None


def read_quantization(content: dict[str, Any], file: Path | str) -> Quantization | None:
    """Return how a config.json's content says that weights are scaled; None if they are plain."""
    key = "quantization_config" if content.get("quantization_config") else "compression_config"
    settings = content.get(key)
    if not settings:
        return None
    where = f"{file}: {key}"
    if not isinstance(settings, dict):
        raise RecipeError(f"{where}={settings!r} must be an object.")
    method = settings.get("quant_method")
    if method == "fp8":
        return _read_fp8(settings, where)
    if method == "compressed-tensors":
        return _read_compressed_tensors(settings, where)
    raise _unsupported(where, f"quant_method {method!r}")


def _unsupported(where: str, what: str) -> RecipeError:
    return RecipeError(
        f"{where}: {what} is not supported; weights may be plain, or FP8 with scales by block or "
        "row (quant_method fp8, or compressed-tensors' float-quantized): use such a folder."
    )


def _read_fp8(settings: dict[str, Any], where: str) -> Quantization:
    if str(settings.get("fmt", "e4m3")) not in ("e4m3", "float8_e4m3fn"):
        raise _unsupported(where, f"fmt {settings['fmt']!r}")
    if settings.get("activation_scheme", "dynamic") != "dynamic":
        raise _unsupported(where, f"activation_scheme {settings['activation_scheme']!r}")
    size = settings.get("weight_block_size", [128, 128])
    strategy = TENSOR if size is None else _block(size, where)
    return Quantization("fp8", "weight_scale_inv", (strategy,), rounds_product=False)


def _block(size: Any, where: str) -> Strategy:
    is_pair = isinstance(size, list) and len(size) == 2
    if not is_pair or not all(type(n) is int and n > 0 for n in size):
        raise RecipeError(f"{where}: a block size must be two whole numbers above 0, not {size!r}.")
    return size[0], size[1]


def _read_compressed_tensors(settings: dict[str, Any], where: str) -> Quantization:
    for key in ("transform_config", "kv_cache_scheme"):
        if settings.get(key):
            raise _unsupported(where, key)
    sparsity = _section(settings, "sparsity_config", where)
    if sparsity.get("format", "dense") != "dense":
        raise _unsupported(where, f"sparsity format {sparsity['format']!r}")
    if settings.get("quantization_status", "compressed") != "compressed":
        raise _unsupported(where, f"quantization_status {settings['quantization_status']!r}")
    groups = settings.get("config_groups")
    if not isinstance(groups, dict) or not groups:
        raise RecipeError(f"{where} has no config_groups; copy the model's original config.json.")
    strategies = tuple(
        _group_strategy(group, settings.get("format"), f"{where}.config_groups.{name}")
        for name, group in groups.items()
    )
    return Quantization("compressed-tensors", "weight_scale", strategies, rounds_product=True)


def _group_strategy(group: dict[str, Any], outer_format: str | None, where: str) -> Strategy:
    """Return one group's strategy; RecipeError unless its weights are symmetric 8-bit floats."""
    if not isinstance(group, dict):
        raise RecipeError(f"{where}={group!r} must be an object.")
    form = group.get("format") or outer_format
    if form not in FORMATS:
        raise _unsupported(where, f"format {form!r}")
    weights = _section(group, "weights", where)
    for key, wanted in (("num_bits", 8), ("type", "float"), ("symmetric", True)):
        if weights.get(key, wanted) != wanted:
            raise _unsupported(where, f"weights.{key} {weights[key]!r}")
    inputs = _section(group, "input_activations", where)
    if inputs and inputs.get("dynamic") is not True:
        raise _unsupported(where, "a stored scale of input activations")
    if group.get("output_activations"):
        raise _unsupported(where, "output_activations")
    return _STRATEGIES.get(str(weights.get("strategy")), _unknown)(weights, where)


def _section(settings: dict[str, Any], key: str, where: str) -> dict[str, Any]:
    """Return a part of the settings; empty where it is missing or null."""
    found = settings.get(key)
    if found is not None and not isinstance(found, dict):
        raise RecipeError(f"{where}: {key}={found!r} must be an object.")
    return found or {}


def _unknown(weights: dict[str, Any], where: str) -> Strategy:
    raise _unsupported(where, f"weights.strategy {weights.get('strategy')!r}")


_STRATEGIES = {
    "tensor": lambda weights, where: TENSOR,
    "channel": lambda weights, where: ROW,
    "block": lambda weights, where: _block(weights.get("block_structure"), where),
    "group": lambda weights, where: (1, _block([1, weights.get("group_size")], where)[1]),
}
