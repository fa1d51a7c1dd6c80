"""Compare two Hugging Face folders or manifests: config, every tensor, and what they compute.

Bytes are compared by hash. Where both are folders, tensors that differ are measured, and models of
at most SMALL bytes run on a fixed batch: the largest difference of their logits, and
KL(a, b) = mean over tokens of sum_v p_a (log p_a - log p_b), in fp32.
"""

from __future__ import annotations

import itertools
import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from iwopd_megatron.errors import RecipeError
from iwopd_megatron.hf.config import read_hf_config
from iwopd_megatron.parity.hf_reference import hf_model
from iwopd_megatron.weights import manifest
from iwopd_megatron.weights.hf_reader import HfTensors, unchecked_weights
from iwopd_megatron.weights.manifest import DTYPES, ManifestEntry, hash_tensor

SMALL = 4 * 10**9
ROWS, TOKENS = 4, 32  # the fixed batch


@dataclass
class Side:
    """A folder or a manifest: its config's essentials and an entry for every tensor."""

    path: Path
    config: dict[str, Any]
    tensors: dict[str, ManifestEntry]
    source: HfTensors | None = None  # None for a manifest, which has no bytes

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors' data."""
        return sum(
            math.prod(x["shape"]) * DTYPES[x["dtype"]].itemsize for x in self.tensors.values()
        )


@dataclass
class Difference:
    """What `compare` found; equal where `problems` is empty."""

    figures: dict[str, Any]
    problems: list[str] = field(default_factory=list)


def read_side(path: Path, workers: int = 1) -> Side:
    """Read a Hugging Face folder, whose bytes are hashed, or a checkpoint's or a lone manifest.

    RecipeError if the path is none of them.
    """
    if not path.exists():
        raise RecipeError(f"{path} does not exist.")
    if not (path / "config.json").is_file():
        found = manifest.read(path)
        if found is None:
            raise RecipeError(f"{path} has neither config.json nor {manifest.NAME}.")
        return Side(path, found["config"], found["tensors"])
    hf = read_hf_config(path)
    # what is missing or extra is what a comparison tells
    source = HfTensors(path, getattr(torch, hf.dtype), unchecked_weights(path))
    with ThreadPoolExecutor(max(1, workers)) as pool:
        entries = pool.map(lambda name: hash_tensor(source[name], name, path), list(source))
        tensors = dict(zip(source, entries, strict=True))
    return Side(path, manifest.essentials(hf), tensors, source)


def compare(a: Side, b: Side, tolerance: float = 0.0) -> Difference:
    """Compare two models; with a tolerance, weights, logits and KL may differ by that."""
    result = Difference({"tensors": len(a.tensors), "different": 0, "max_weight_error": 0.0})
    for key in sorted(a.config.keys() | b.config.keys()):
        if a.config.get(key) != b.config.get(key):
            result.problems.append(f"config: {key} is {a.config.get(key)} and {b.config.get(key)}")
    has_same_shapes = a.tensors.keys() == b.tensors.keys()
    twins = {found["xxh3_64"]: name for name, found in b.tensors.items()}
    for name in sorted(a.tensors.keys() | b.tensors.keys()):
        if name not in a.tensors or name not in b.tensors:
            only = a.path if name in a.tensors else b.path
            result.problems.append(f"{name} is in {only} only")
        elif a.tensors[name] != b.tensors[name]:
            result.figures["different"] += 1
            has_same_shapes &= a.tensors[name]["shape"] == b.tensors[name]["shape"]
            _explain(result, name, a, b, twins, tolerance)
    is_small = max(a.nbytes, b.nbytes) <= SMALL
    if has_same_shapes and is_small and a.source is not None and b.source is not None:
        logits, kl = _outputs(a.path, b.path, a.config["vocab_size"])
        result.figures |= {"logits": logits, "kl": kl}
        result.problems += [
            f"{key} differ by {value:.3g}, allowed {tolerance:g}"
            for key, value in (("logits", logits), ("kl", kl))
            if not value <= tolerance
        ]
    return result


def _explain(
    result: Difference, name: str, a: Side, b: Side, twins: dict[str, str], tolerance: float
) -> None:
    """Add one sentence on why a tensor differs, unless it does so within the tolerance."""
    ours, theirs = a.tensors[name], b.tensors[name]
    pairs = {
        "shape": (ours["shape"], theirs["shape"]),
        "dtype": (ours["dtype"], theirs["dtype"]),
    }
    for what, (own, other) in pairs.items():
        if own != other:
            result.problems.append(f"{name}: {what} is {own} and {other}")
            return
    twin = twins.get(ours["xxh3_64"])
    also = f"; {a.path} has there what {b.path} has as {twin}" if twin else ""
    if a.source is None or b.source is None:
        result.problems.append(f"{name}: bytes differ{also}")
        return
    error = _largest_error(a.source, b.source, name)
    result.figures["max_weight_error"] = max(result.figures["max_weight_error"], error)
    if not error <= tolerance or tolerance == 0:
        result.problems.append(f"{name} differs by {error:.3g}, allowed {tolerance:g}{also}")


def _largest_error(a: HfTensors, b: HfTensors, name: str) -> float:
    """Return the largest absolute difference of two folders' tensor; NaN counts as infinite."""
    ours, theirs = a[name], b[name]
    worst, rows = 0.0, ours.get_shape()[0]
    for first, last in itertools.pairwise([*range(0, rows, 1024), rows]):
        error = (ours[first:last].double() - theirs[first:last].double()).abs().max().item()
        worst = max(worst, error if error == error else math.inf)
    return worst


@torch.no_grad()
def _outputs(a: Path, b: Path, vocabulary: int) -> tuple[float, float]:
    """Return (largest difference of logits, mean KL) on a fixed batch, by transformers in fp32."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, vocabulary, (ROWS, TOKENS), generator=generator)
    logits = []
    for path in (a, b):
        model = hf_model(path, torch.float32)
        logits.append(model.eval()(ids).logits.double())
        del model
    ours, theirs = (x.log_softmax(-1) for x in logits)
    kl = (ours.exp() * (ours - theirs)).sum(-1).mean().item()
    return (logits[0] - logits[1]).abs().max().item(), kl
