"""The recipe's models: where they lie, their type, and how each is cut over processes."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveInt


class Section(BaseModel):
    """A part of a recipe: immutable, and an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Layout(Section):
    """How a Megatron model is cut over processes. Sequence parallelism is on whenever tp > 1."""

    tp: PositiveInt = Field(1, description="tensor-parallel size")
    pp: PositiveInt = Field(1, description="pipeline-parallel size")
    vpp: PositiveInt = Field(
        1, description="model chunks per pipeline stage (interleaved schedule)"
    )
    ep: PositiveInt = Field(1, description="expert-parallel size")
    etp: PositiveInt = Field(1, description="tensor-parallel size inside each expert")
    cp: PositiveInt = Field(1, description="context-parallel size")

    @property
    def unit(self) -> int:
        """Smallest number of processes this layout fits on; a world is a multiple of it."""
        return math.lcm(self.tp * self.cp, self.ep * self.etp) * self.pp

    @property
    def token_multiple(self) -> int:
        """A packed sequence's length is a multiple of this, so that the zigzag cut is even."""
        return 2 * self.cp if self.cp > 1 else 1

    @property
    def microbatch_multiple(self) -> int:
        """A micro-batch's length is a multiple of this: zigzag halves, each cut over tp."""
        return 2 * self.cp * self.tp if self.cp > 1 else self.tp


class Model(Section):
    hf: Path = Field(description="Hugging Face folder: config.json, tokenizer, safetensors")
    dtype: Literal["fp32", "bf16"] = Field("fp32", description="parameter and matrix-product type")


class Student(Model):
    parallel: Layout = Layout()
    random_init: int | None = Field(
        None, description="seed: start from random weights, not from hf's tensors"
    )
    recompute: Literal["none", "selective", "full"] = Field(
        "none",
        description="activations recomputed in the backward pass: attention and experts, or all",
    )


class Frozen(Model):
    """An embedded model that only scores: same processes and layout as the student, own sizes."""

    offload: bool = Field(False, description="keep its weights in host memory except while scoring")
    microbatch_tokens: PositiveInt | None = Field(
        None, description="token budget of its micro-batches; default: train.microbatch_tokens"
    )
