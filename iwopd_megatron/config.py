"""The typed recipe: frozen pydantic models, one section each. `recipe.py` reads them from YAML.

Imports no torch. Paths are relative to the current directory.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, NonNegativeFloat, PositiveInt

Beta = Annotated[float, Field(ge=0, lt=1)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Layout(_Section):
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


class Model(_Section):
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


class Rollout(_Section):
    engine: Literal["hf"] = Field("hf", description="hf: embedded, split over the ranks")
    max_prompt_tokens: PositiveInt = Field(
        2048, description="longer prompts are filtered out, never cut"
    )
    max_response_tokens: PositiveInt = Field(
        16384, description="generation stops here (counted as truncated)"
    )
    temperature: float = Field(
        1.0, gt=0, description="sampling temperature; teacher scores use it too"
    )
    top_p: float = Field(
        1.0, gt=0, le=1, description="sample from the likeliest tokens of this joint probability"
    )
    batch_size: PositiveInt = Field(512, description="prompts one rank generates for at a time")


class Data(_Section):
    train: Path = Field(
        description="JSONL with question, answer, difficulty, source (and response for sft)"
    )
    eval: Path | None = Field(None, description="JSONL of held-out problems")
    shuffle: bool = Field(True, description="a new order every epoch; false: the order of the file")


class Weighting(_Section):
    rule: Literal[
        "uniform", "iw", "surrogate", "iw_signed", "log_ratio", "ratio", "ratio_blend", "linear",
        "prefix_boost", "prefix", "suffix", "schedule",
    ] = Field("iw", description="token weights w_t, see weighting.py; uniform: OPD")  # fmt: skip
    gamma: NonNegativeFloat = Field(
        0.5, description="iw, iw_signed, ratio_blend, linear, prefix_boost: strength (Eq. 17)"
    )
    alpha: float = Field(
        0.01, gt=0, le=1, description="ratio, ratio_blend: exponent of the prefix ratio (Eq. 46)"
    )
    share: float = Field(
        0.3, gt=0, le=1, description="prefix, suffix, prefix_boost: share of the response"
    )
    denominator: Literal["exclusive", "inclusive"] = Field(
        "exclusive",
        description="iw, surrogate: total of the gaps without the last token (Eq. 16) "
        "or with it (authors' code)",
    )
    start: float = Field(0.3, gt=0, le=1, description="schedule: prefix share of the first round")
    end: float = Field(1.0, gt=0, le=1, description="schedule: prefix share after the last round")
    anneal: Literal["cosine", "linear"] = Field(
        "cosine", description="schedule: how the share goes from start to end"
    )


class TopK(_Section):
    """The dense variant's support: the teacher's K likeliest tokens at each position."""

    k: PositiveInt = Field(64, description="tokens of the support")
    support: Literal["renormalised", "tail", "truncated"] = Field(
        "renormalised",
        description="both models renormalised on the support, or a bucket for the rest of the "
        "vocabulary; truncated has neither and is not a divergence",
    )


class Loss(_Section):
    objective: Literal["policy", "topk_kl"] = Field(
        "policy",
        description="policy: the sampled token's advantage (the paper); topk_kl: "
        "KL(student || teacher) on the teacher's top K, differentiated as a loss",
    )
    advantage: Literal["sampled_gap", "topk_kl"] = Field(
        "sampled_gap", description="policy: teacher's minus student's log-prob of the sampled token"
    )
    extrapolation: float = Field(
        1.0,
        gt=0,
        description="policy: lambda of ExOPD, lambda (teacher - base) - (student - base); 1 is OPD",
    )
    weighting: Weighting = Weighting()
    clip: float = Field(
        0.2, gt=0, description="policy: PPO clip range; inert with one optimiser step a round"
    )
    dual_clip: float | None = Field(
        None,
        gt=1,
        description="policy: where the advantage is negative, a token's loss is at most this "
        "times -advantage (authors' code: 3.0); null: no bound",
    )
    tis_cap: float | None = Field(
        5.0,
        gt=0,
        description="policy: cap of the truncated importance weight trainer / engine; null: off",
    )
    aggregation: Literal["token_mean", "seq_mean_token_mean", "seq_mean_token_sum"] = Field(
        "seq_mean_token_mean",
        description="seq_mean_token_mean reproduces the paper: every response counts the same; "
        "token_mean: every token does",
    )
    mask_special_tokens: Literal["none", "all_but_eos", "all"] = Field(
        "none", description="tokens the tokenizer calls special that no loss and no sum reads"
    )
    mask_truncated: bool = Field(
        False, description="no loss reads a response that was cut at rollout.max_response_tokens"
    )
    topk: TopK = TopK()


class Train(_Section):
    rounds: PositiveInt = Field(100, description="rounds of rollout and training")
    prompts_per_round: PositiveInt = Field(1024, description="prompts, one response each")
    minibatches: PositiveInt = Field(
        1, description="parts a round's responses are dealt into, an optimiser step each"
    )
    epochs: PositiveInt = Field(1, description="times a round's responses are trained on")
    microbatch_tokens: PositiveInt = Field(
        20480, description="token budget of one packed micro-batch"
    )
    lr: float = Field(1e-5, gt=0, description="peak learning rate")
    schedule: Literal["constant", "cosine"] = "constant"
    warmup_rounds: int = Field(0, ge=0, description="linear warm-up")
    min_lr: float = Field(0.0, ge=0, description="end of the cosine")
    betas: tuple[Beta, Beta] = Field((0.9, 0.999), description="AdamW moments")
    eps: float = Field(1e-8, gt=0, description="AdamW denominator")
    weight_decay: float = Field(0.01, ge=0)
    clip_grad: float = Field(1.0, gt=0, description="global gradient-norm clip")
    seed: int = Field(1, description="data order and sampling")
    distributed_optimizer: bool = Field(
        True, description="shard optimiser states over data-parallel ranks"
    )


class Evaluate(_Section):
    every: PositiveInt = Field(
        10, description="rounds between evaluations; also before the first and after the last"
    )
    problems: PositiveInt = Field(512, description="first problems of data.eval")
    temperature: float = Field(1.0, ge=0, description="0 is greedy")


class Checkpoint(_Section):
    every: PositiveInt | None = Field(
        50, description="rounds between checkpoints; null: only when stopped"
    )
    keep: PositiveInt = Field(2, description="newest complete checkpoints kept")


class Gates(_Section):
    max_drift: float = Field(
        0.5, gt=0, description="stop when mean |trainer - engine| log-prob exceeds this (nats)"
    )


class Recipe(_Section):
    """Everything a run is, in one file."""

    out: Path = Field(description="run folder")
    student: Student
    teacher: Frozen | None = Field(None, description="absent: supervised fine-tuning only")
    base: Frozen | None = Field(
        None, description="ExOPD: the base student; default: what student.hf holds"
    )
    data: Data
    rollout: Rollout = Rollout()
    loss: Loss = Loss()
    train: Train = Train()
    evaluate: Evaluate = Evaluate()
    checkpoint: Checkpoint = Checkpoint()
    gates: Gates = Gates()
    processes: PositiveInt | None = Field(
        None, description="world size; default: the fewest the layout fits on"
    )

    @property
    def world(self) -> int:
        return self.processes or self.student.parallel.unit

    @property
    def steps_per_round(self) -> int:
        """Optimiser steps a round; with more than one, old log-probs are computed up front."""
        return self.train.minibatches * self.train.epochs

    @property
    def base_model(self) -> Frozen | None:
        """The model ExOPD extrapolates from; None where it does not."""
        if self.loss.extrapolation == 1.0:
            return None
        return self.base or Frozen(hf=self.student.hf, dtype=self.student.dtype)
