"""The typed recipe: frozen pydantic models from YAML plus dotted overrides, checked up front.

Imports no torch, so a wrong recipe is refused at once. A problem is one `RecipeError` sentence that
names the key and says what to write instead. Paths are relative to the current directory.
"""

from __future__ import annotations

import difflib
import math
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, NonNegativeFloat, PositiveInt, ValidationError

from iwopd_megatron.errors import RecipeError
from iwopd_megatron.preflight import check

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


class Teacher(Model):
    """The embedded teacher: same processes and layout as the student, its own sizes."""

    offload: bool = Field(False, description="keep its weights in host memory except while scoring")


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


class Loss(_Section):
    weighting: Weighting = Weighting()
    clip: float = Field(
        0.2, gt=0, description="PPO clip range; inert with one optimiser step a round"
    )
    tis_cap: float = Field(
        5.0, gt=0, description="cap of the truncated importance weight trainer / engine"
    )
    aggregation: Literal["token_mean", "seq_mean_token_mean", "seq_mean_token_sum"] = Field(
        "seq_mean_token_mean",
        description="seq_mean_token_mean reproduces the paper: every response counts the same",
    )


class Train(_Section):
    rounds: PositiveInt = Field(100, description="rounds; one optimiser step each")
    prompts_per_round: PositiveInt = Field(1024, description="prompts, one response each")
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
    teacher: Teacher | None = Field(None, description="absent: supervised fine-tuning only")
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


def load_recipe(path: Path, overrides: list[str] = ()) -> Recipe:
    """Read YAML, apply `a.b=value` overrides (YAML syntax), and check everything checkable."""
    if not path.is_file():
        raise RecipeError(
            f"recipe {path} does not exist; "
            "recipes ship in recipes/, e.g. recipes/demo_tiny_moe.yaml."
        )
    try:
        tree = yaml.safe_load(path.read_text()) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(
            f"recipe {path} is not valid YAML: {' '.join(str(error).split())}."
        ) from None
    if not isinstance(tree, dict):
        raise RecipeError(
            f"recipe {path} must hold 'key: value' lines, not a {type(tree).__name__}."
        )
    for override in overrides:
        _apply(tree, override)
    recipe = parse_recipe(tree, str(path))
    check(recipe)
    return recipe


def parse_recipe(tree: dict[str, Any], where: str) -> Recipe:
    """Validate types and key names; the first problem becomes a RecipeError."""
    try:
        return Recipe.model_validate(tree)
    except ValidationError as error:
        raise RecipeError(f"{where}: {_sentence(error.errors()[0])}") from None


def _apply(tree: dict[str, Any], override: str) -> None:
    key, equals, value = override.partition("=")
    if not equals or not key:
        raise RecipeError(f"override '{override}' is not key=value; write e.g. train.lr=3e-4.")
    *parents, leaf = key.split(".")
    for parent in parents:
        if tree.get(parent) is None:
            tree[parent] = {}
        tree = tree[parent]
        if not isinstance(tree, dict):
            raise RecipeError(f"override '{override}': '{parent}' holds a value, not a section.")
    try:
        tree[leaf] = yaml.safe_load(value)
    except yaml.YAMLError:
        raise RecipeError(
            f"override '{override}': cannot read '{value}' as a YAML value."
        ) from None


def _sentence(error: dict[str, Any]) -> str:
    path = [str(part) for part in error["loc"]]
    key = ".".join(path)
    if error["type"] == "extra_forbidden":
        section: Any = Recipe
        for part in path[:-1]:
            section = _section_class(section.model_fields[part].annotation)
        close = difflib.get_close_matches(path[-1], section.model_fields, 1)
        hint = (
            f"did you mean '{close[0]}'?"
            if close
            else f"known keys: {', '.join(section.model_fields)}."
        )
        return f"unknown key '{key}'; {hint}"
    if error["type"] == "missing":
        return f"'{key}' is missing; add it to the recipe or write {key}=... on the command line."
    return f"'{key}' is {error.get('input')!r}: {error['msg'][0].lower()}{error['msg'][1:]}."


def _section_class(annotation: Any) -> type[_Section]:
    options = getattr(annotation, "__args__", (annotation,))
    return next(o for o in options if isinstance(o, type) and issubclass(o, _Section))
