"""A recipe's further settings of TransformerConfig: whether they can be had here, and kept to.

Megatron refuses some combinations itself; its sentence is the user's then. What its dispatch and
its paged stash had no room for is lost without an error, so it is asked for after every schedule.
"""

from __future__ import annotations

import dataclasses
from importlib.metadata import version

import torch

from iwopd_megatron.config.models import Student
from iwopd_megatron.errors import GateError, RecipeError
from iwopd_megatron.models.gpt import DTYPES
from iwopd_megatron.models.layer_specs import has_transformer_engine
from iwopd_megatron.runtime.megatron import (
    MoELayer,
    TransformerConfig,
    check_paged_stash_overflow,
    unwrap_model,
)
from iwopd_megatron.runtime.parallel import any_rank

_ANYWHERE = {"moe_token_dispatcher_type": ("alltoall", "allgather")}


def check_settings(student: Student) -> None:
    """Refuse settings that this machine's Megatron or modules do not have; RecipeError."""
    known = {field.name for field in dataclasses.fields(TransformerConfig)}
    for name, value in student.megatron.given.items():
        if name not in known:
            raise RecipeError(
                f"student.megatron.{name} is no setting of Megatron-Core "
                f"{version('megatron-core')}; leave it out, or install a newer one."
            )
        is_native = value in _ANYWHERE.get(name, ())
        if not is_native and not has_transformer_engine(DTYPES[student.dtype]):
            raise RecipeError(
                f"student.megatron.{name}={str(value).lower()} needs TransformerEngine, a GPU and "
                "student.dtype=bf16; leave it out."
            )


def check_room(chunks: list[torch.nn.Module]) -> None:
    """Stop if tokens or activations of the last schedule were lost, on any rank; GateError.

    Does nothing, and communicates nothing, unless ranks have a budget of tokens. Collective.
    """
    config = unwrap_model(chunks[0]).config
    budget = getattr(config, "moe_expert_rank_capacity_factor", None)  # since 0.18
    if budget is None:
        return
    layers = [x for chunk in chunks for x in chunk.modules() if isinstance(x, MoELayer)]
    dropped = any(bool(layer.token_dispatcher.check_over_budget()) for layer in layers)
    if any_rank(dropped):
        raise GateError(
            "more tokens went to a rank's experts than it has room for; raise "
            "student.megatron.moe_expert_rank_capacity_factor, or leave it out."
        )
    if any_rank(bool(check_paged_stash_overflow())):
        raise GateError(
            "the paged stash was too small for a round's activations; raise "
            "student.megatron.moe_paged_stash_buffer_size_factor_cuda."
        )
