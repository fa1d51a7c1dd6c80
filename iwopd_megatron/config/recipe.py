"""The typed recipe: frozen pydantic models, one section each. `load.py` reads them from YAML.

Imports no torch. Paths are relative to the current directory.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from iwopd_megatron.config.cluster import Cluster
from iwopd_megatron.config.data import Data
from iwopd_megatron.config.loss import Loss
from iwopd_megatron.config.models import Frozen, PositiveInt, Section, Service, Student, Teacher
from iwopd_megatron.config.rollout import Rollout

Beta = Annotated[float, Field(ge=0, lt=1)]


class Train(Section):
    """Rounds, their size, and the optimiser."""

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
    schedule: Literal["constant", "cosine"] = Field(
        "constant", description="learning rate after the warm-up"
    )
    warmup_rounds: int = Field(0, ge=0, description="linear warm-up")
    min_lr: float = Field(0.0, ge=0, description="end of the cosine")
    betas: tuple[Beta, Beta] = Field((0.9, 0.999), description="AdamW moments")
    eps: float = Field(1e-8, gt=0, description="AdamW denominator")
    weight_decay: float = Field(0.01, ge=0, description="AdamW, decoupled")
    clip_grad: float = Field(1.0, gt=0, description="global gradient-norm clip")
    seed: int = Field(1, ge=0, lt=2**63, description="data order and sampling")
    distributed_optimizer: bool = Field(
        True, description="shard optimiser states over data-parallel ranks"
    )


class Evaluate(Section):
    """When and on what the student is evaluated, and how it answers."""

    every: PositiveInt = Field(
        10, description="rounds between evaluations; also before the first and after the last"
    )
    problems: PositiveInt = Field(512, description="first problems of data.eval")
    benchmarks: list[str] = Field(
        [], description="besides data.eval, whole: aime25, ... of 'iwopd eval' and data.benchmarks"
    )
    samples: PositiveInt = Field(1, description="answers a problem; programs get one, greedy")
    temperature: float = Field(1.0, ge=0, description="0 is greedy")
    reverse_kl: bool = Field(
        False,
        description="teacher and student score the answers to data.eval: held-out reverse KL, also "
        "by position, and the teacher's perplexity of them",
    )
    enable_thinking: bool | None = Field(
        None, description="as data.enable_thinking, for evaluation; default: what that says"
    )


class Checkpoint(Section):
    """When checkpoints are written, and how many are kept."""

    every: PositiveInt | None = Field(
        50, description="rounds between checkpoints; null: only when stopped"
    )
    keep: PositiveInt = Field(2, description="newest complete checkpoints kept")
    async_save: bool = Field(
        True, description="train on while a process writes; false: wait for the disk"
    )


class Wandb(Section):
    """Where metrics go in Weights & Biases."""

    project: str = Field(description="W&B project")
    entity: str | None = Field(None, description="team or user; default: the account's own")
    group: str | None = Field(None, description="what the runs of a comparison share")
    mode: Literal["online", "offline"] = Field(
        "online", description="offline: RUN/wandb, to be sent later with 'wandb sync'"
    )


class Gates(Section):
    """Limits at which a run stops: figures that would mean that it trains on something wrong."""

    max_drift: float = Field(
        0.5, gt=0, description="stop when mean |trainer - engine| log-prob exceeds this (nats)"
    )
    same_chat_template: bool = Field(
        True, description="stop when a teacher's chat template is not the student's"
    )
    max_canary: float = Field(
        0.1, gt=0, description="the same for a fixed prompt, right after a weight update"
    )
    host_memory: bool = Field(
        True, description="on CPUs: refuse to start where the machine's memory would not do"
    )
    on_bad_sample: Literal["stop", "drop"] = Field(
        "stop",
        description="an answer whose teacher log-probs are impossible (NaN, -inf, positive): stop "
        "the run, or train without it (counted as dropped)",
    )
    max_truncation_jump: float = Field(
        0.5, gt=0, description="stop when the truncated share exceeds the last 10 rounds' by this"
    )


class Recipe(Section):
    """Everything a run is, in one file."""

    out: Path = Field(description="run folder")
    student: Student
    teacher: Teacher | None = Field(
        None, description="absent, and teachers too: supervised fine-tuning only"
    )
    teachers: dict[str, Teacher] = Field(
        {}, description="instead of teacher: one for each source of the problems, e.g. math, code"
    )
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
    wandb: Wandb | None = Field(
        None, description="metrics to Weights & Biases too; pip install 'iwopd-megatron[wandb]'"
    )
    cluster: Cluster | None = Field(None, description="GPUs of each role, for plan and launch")
    processes: PositiveInt | None = Field(
        None, description="world size; default: cluster.trainer, or the fewest the layout fits on"
    )

    @property
    def world(self) -> int:
        """Processes of the trainer's world."""
        gpus = self.cluster.trainer if self.cluster else None
        return self.processes or gpus or self.student.parallel.unit

    @property
    def is_distilling(self) -> bool:
        """Whether there is a teacher; without one given responses are trained on."""
        return self.teacher is not None or bool(self.teachers)

    @property
    def thinks_in_evaluation(self) -> bool:
        """Whether the chat template of held-out problems is told to enable thinking."""
        own = self.evaluate.enable_thinking
        return self.data.enable_thinking if own is None else own

    @property
    def named_teachers(self) -> dict[str, Teacher]:
        """All teachers by their key in the recipe: 'teacher', or 'teachers.SOURCE' each."""
        if self.teacher is not None:
            return {"teacher": self.teacher}
        return {f"teachers.{source}": teacher for source, teacher in self.teachers.items()}

    @property
    def services(self) -> dict[str, Service]:
        """Teacher services that a launch starts, by the teacher's key."""
        teachers = self.named_teachers.items()
        return {key: one.service for key, one in teachers if one.service and not one.urls}

    @property
    def service_processes(self) -> dict[str, int]:
        """Processes of every teacher service that a launch starts, by the teacher's key.

        Its share of cluster.teacher (`Cluster.service_shares`, which may raise RecipeError), or
        where that is 0 as many as it asks for, else the fewest its layout fits on.
        """
        if self.cluster is None or not self.cluster.teacher:
            return {key: service.world for key, service in self.services.items()}
        return self.cluster.service_shares(self.services)

    @property
    def steps_per_round(self) -> int:
        """Optimiser steps a round; with more than one, old log-probs are computed up front."""
        return self.train.minibatches * self.train.epochs

    @property
    def topk(self) -> int:
        """How many of a teacher's likeliest tokens the loss reads; 0 for the policy loss."""
        return self.loss.topk.k if self.loss.objective == "topk_kl" else 0

    @property
    def embedded_scorers(self) -> dict[str, Frozen]:
        """Models that score in the trainer's processes: teachers by their key, and "base"."""
        found: dict[str, Frozen] = {}
        found |= {key: one for key, one in self.named_teachers.items() if not one.is_remote}
        return found | ({"base": self.base_model} if self.base_model else {})

    @property
    def base_model(self) -> Frozen | None:
        """The model ExOPD extrapolates from; None where it does not."""
        if self.loss.extrapolation == 1.0:
            return None
        return self.base or Frozen(hf=self.student.hf, dtype=self.student.dtype)
