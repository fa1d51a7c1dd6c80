"""Rotary settings of a config.json, by transformers' precedence (modeling_rope_utils.py, 5.23.0).

A non-empty `rope_scaling` replaces `rope_parameters`; `rope_theta` inside either wins over the
one at the top level; `rope_type` wins over `type`. models/rotary.py computes with it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from iwopd_megatron.errors import RecipeError
from iwopd_megatron.files.typed_json import TypedJson

KINDS = ("default", "linear", "llama3", "yarn")
DEFAULT_THETA = 10_000.0


@dataclass(frozen=True)
class Rope:
    """Rotary positions: base, kind of scaling, and what the kind reads.

    `original_positions` is the context length before scaling, in tokens; `attention_factor`
    multiplies cosine and sine (1 for all kinds but yarn).
    """

    theta: float
    kind: str = "default"
    factor: float = 1.0
    original_positions: int = 0
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0
    attention_factor: float = 1.0
    truncate: bool = True
    partial_rotary_factor: float = 1.0  # how much of a head is turned, from its beginning
    interleaved: bool = False  # pairs are neighbours, and not in halves
    score_factor: float = 1.0  # on attention scores, in families that read mscale_all_dim so

    def essentials(self) -> dict[str, Any]:
        """Return what differs from the defaults, as {"rope_theta": ..., "rope": {...}}."""
        default = Rope(self.theta)
        changed = {k: v for k, v in vars(self).items() if v != getattr(default, k)}
        return {"rope_theta": self.theta} | ({"rope": changed} if changed else {})


def read_rope(
    content: dict[str, Any], positions: int, file: Path | str, partial: float | None = None
) -> Rope:
    """Return the rotary settings of a config.json's content; `positions` is its longest context.

    partial: the share of a head that is turned where none is named; None: only all of it may be.
    """
    found = content.get("rope_scaling") or content.get("rope_parameters") or {}
    if not isinstance(found, dict):
        raise RecipeError(f"{file}: rope_parameters={found!r} must be an object.")
    name = "rope_scaling" if content.get("rope_scaling") else "rope_parameters"
    nested = [key for key, value in found.items() if isinstance(value, dict)]
    if nested:
        raise RecipeError(
            f"{file}: {name} has settings of its own for '{nested[0]}'; only one set for all "
            "layers is supported, which every published Qwen3 model has."
        )
    top = {k: content[k] for k in ("rope_theta", "partial_rotary_factor") if k in content}
    rope = TypedJson({"rope_theta": DEFAULT_THETA} | top | found, f"{file}: {name}")
    kind = rope.content.get("rope_type", rope.content.get("type", "default"))
    if kind not in KINDS:
        raise RecipeError(
            f"{file}: rope_type {kind!r} is not supported; only {', '.join(KINDS)} are."
        )
    if partial is not None:
        return _read_partial(rope, kind, partial)
    if rope.content.get("partial_rotary_factor", 1) not in (1, None):
        raise RecipeError(f"{file}: partial_rotary_factor is not supported; only 1 is.")
    if kind in ("llama3", "yarn"):
        outer = content.get("original_max_position_embeddings")
        inner = rope.content.get("original_max_position_embeddings", positions)
        rope.content["original_max_position_embeddings"] = inner if outer is None else outer
    return _READERS[kind](rope, positions)


def _read_partial(rope: TypedJson, kind: str, default: float) -> Rope:
    """Return plain rotary settings of a part of each head."""
    share = rope.number("partial_rotary_factor", default)
    if kind != "default" or share > 1:
        raise RecipeError(
            f"{rope.file}: rope_type {kind!r} with partial_rotary_factor={share:g} is not "
            "supported; only 'default' with at most 1 is."
        )
    return replace(Rope(rope.number("rope_theta")), partial_rotary_factor=share)


def _read_default(rope: TypedJson, positions: int) -> Rope:
    return Rope(rope.number("rope_theta"))


def _read_linear(rope: TypedJson, positions: int) -> Rope:
    return Rope(rope.number("rope_theta"), "linear", rope.number("factor"))


def _read_llama3(rope: TypedJson, positions: int) -> Rope:
    low, high = rope.number("low_freq_factor"), rope.number("high_freq_factor")
    if low >= high:
        raise RecipeError(
            f"{rope.file}: low_freq_factor={low:g} must be below high_freq_factor={high:g}."
        )
    return Rope(
        rope.number("rope_theta"),
        "llama3",
        rope.number("factor"),
        rope.count("original_max_position_embeddings"),
        low,
        high,
    )


def _read_yarn(rope: TypedJson, positions: int) -> Rope:
    original = rope.count("original_max_position_embeddings")
    if rope.content.get("factor", 0) is None:
        rope.content["factor"] = positions / original
    factor = rope.number("factor")
    if rope.number("rope_theta") <= 1:
        raise RecipeError(f"{rope.file}: rope_theta={rope.number('rope_theta'):g} must exceed 1.")
    return Rope(
        rope.number("rope_theta"),
        "yarn",
        factor,
        original,
        beta_fast=rope.number("beta_fast") if rope.content.get("beta_fast") else 32.0,
        beta_slow=rope.number("beta_slow") if rope.content.get("beta_slow") else 1.0,
        attention_factor=_attention_factor(rope, factor),
        truncate=rope.flag("truncate", True),
    )


def _attention_factor(rope: TypedJson, factor: float) -> float:
    """Return YaRN's factor on cosine and sine, as given or by arXiv 2309.00071 Eq. 22."""
    if rope.content.get("attention_factor") is not None:
        return rope.number("attention_factor")
    if rope.content.get("mscale") and rope.content.get("mscale_all_dim"):
        above, below = rope.number("mscale"), rope.number("mscale_all_dim")
        return _mscale(factor, above) / _mscale(factor, below)
    return _mscale(factor, 1.0)


def score_factor(content: dict[str, Any], rope: Rope) -> float:
    """Return DeepSeek's factor on attention scores: YaRN's of `mscale_all_dim`, squared.

    `rope` is what `read_rope` made of the same config.json's content. As transformers'
    `yarn_apply_mscale`, for every kind of scaling.
    """
    found = content.get("rope_scaling") or content.get("rope_parameters") or {}
    if rope.kind == "default" or not found.get("mscale_all_dim"):
        return 1.0
    return _mscale(rope.factor, TypedJson(found, "rope_scaling").number("mscale_all_dim")) ** 2


def _mscale(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


_READERS = {
    "default": _read_default,
    "linear": _read_linear,
    "llama3": _read_llama3,
    "yarn": _read_yarn,
}
