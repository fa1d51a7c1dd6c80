"""The recipe's models: folder, dtype and layout. `Section` is the base of every section."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)

PositiveInt = Annotated[int, Field(gt=0, lt=2**31)]
NonNegativeInt = Annotated[int, Field(ge=0, lt=2**31)]
AXES = ("tp", "pp", "vpp", "ep", "etp", "cp")  # the fields of a Layout that are sizes of axes


class Section(BaseModel):
    """A part of a recipe: immutable, and an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _number_is_no_bool(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuse true and false for a number.

        YAML reads yes, no, on and off as true and false, and Python takes those for 1 and 0.
        """
        field = cls.model_fields.get(info.field_name or "")
        kind = None if field is None else field.annotation
        kinds = get_args(kind) or (kind,)
        if isinstance(value, bool) and bool not in kinds and {int, float} & set(kinds):
            raise ValueError("write a number; YAML reads yes, no, on and off as true and false")
        return value


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
    # Where layers are, under Megatron's names; config/stages.py reads them.
    account_for_embedding_in_pipeline_split: bool = Field(
        False, description="the embedding counts as a layer where layers are dealt to stages"
    )
    account_for_loss_in_pipeline_split: bool = Field(
        False, description="the LM head counts as a layer where layers are dealt to stages"
    )
    num_layers_in_first_pipeline_stage: PositiveInt | None = Field(
        None, description="layers of the first stage; the others share the rest evenly"
    )
    num_layers_in_last_pipeline_stage: PositiveInt | None = Field(
        None, description="layers of the last stage; the others share the rest evenly"
    )
    pipeline_model_parallel_layout: str | None = Field(
        None,
        max_length=1000,
        description="every stage's layers, e.g. Et*3|(t*4|)*2t*3L: E embedding, t layer, L LM head",
    )

    @property
    def axes(self) -> dict[str, int]:
        """Sizes of the axes by name; what the other fields say is no axis."""
        return {name: getattr(self, name) for name in AXES}

    @property
    def placement(self) -> dict[str, bool | int | str]:
        """The settings that say where layers are, as far as they are given, by Megatron's names."""
        return self.model_dump(exclude=set(AXES), exclude_defaults=True)

    @property
    def without_experts(self) -> Layout:
        """The layout of a dense model, which is not cut along the expert axes."""
        return self.model_copy(update={"ep": 1, "etp": 1})

    @property
    def unit(self) -> int:
        """The smallest number of processes this layout fits on; a world is a multiple of it."""
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
    """A model: its Hugging Face folder and the dtype it is held in."""

    hf: Path = Field(description="Hugging Face folder: config.json, tokenizer, safetensors")
    dtype: Literal["fp32", "bf16"] = Field("fp32", description="parameter and matrix-product type")


class MegatronSettings(Section):
    """Settings of Megatron's TransformerConfig under its own names; null: Megatron's default.

    They change where and how experts are computed, not what.
    """

    moe_token_dispatcher_type: Literal["alltoall", "allgather", "flex"] | None = Field(
        None, description="how tokens reach their experts; flex needs TransformerEngine"
    )
    moe_flex_dispatcher_backend: Literal["deepep", "hybridep", "ncclep"] | None = Field(
        None, description="what carries tokens under flex; a library of its own"
    )
    moe_permute_fusion: bool | None = Field(
        None, description="TransformerEngine's kernels sort tokens by expert"
    )
    use_transformer_engine_op_fuser: bool | None = Field(
        None, description="TransformerEngine's fused experts, which the paged stash needs"
    )
    moe_expert_rank_capacity_factor: float | None = Field(
        None, gt=0, description="tokens a rank has room for, over the mean; more stop the run"
    )
    moe_paged_stash: bool | None = Field(
        None, description="keep experts' activations in pages of a buffer; a full one stops the run"
    )
    moe_paged_stash_page_size: PositiveInt | None = Field(None, description="tokens of a page")
    moe_paged_stash_buffer_size_factor_cuda: float | None = Field(
        None, description="size of the buffer: over the mean, or negative: over the largest so far"
    )
    moe_paged_stash_buffer_size_factor_cpu: float | None = Field(
        None, description="the same for a buffer in host memory; 0: none"
    )

    @model_validator(mode="before")
    @classmethod
    def _graphs_need_one_shape(cls, value: Any) -> Any:
        if isinstance(value, dict) and any("cuda_graph" in str(name) for name in value):
            raise ValueError(
                "leave CUDA graphs out: Megatron captures a layer once, for one length and one "
                "number of packed sequences, and micro-batches here differ in both"
            )
        return value

    @property
    def given(self) -> dict[str, Any]:
        """The settings that are passed on."""
        return self.model_dump(exclude_none=True)


class Student(Model):
    """The model that is trained: its layout, its start and what its backward pass recomputes."""

    parallel: Layout = Layout()
    random_init: int | None = Field(
        None, ge=0, lt=2**63, description="seed: start from random weights, not from hf's tensors"
    )
    recompute: Literal["none", "selective", "full"] = Field(
        "none",
        description="activations recomputed in the backward pass: attention and experts, or all",
    )
    megatron: MegatronSettings = MegatronSettings()


class Frozen(Model):
    """An embedded model that only scores: same processes and layout as the student, own sizes."""

    offload: bool = Field(False, description="keep its weights in host memory except while scoring")
    microbatch_tokens: PositiveInt | None = Field(
        None, description="token budget of its micro-batches; default: train.microbatch_tokens"
    )


class Service(Section):
    """A teacher's scoring server: Megatron processes of its own, in a layout of their own."""

    parallel: Layout = Layout()
    processes: PositiveInt | None = Field(
        None, description="world size; default: the fewest the layout fits on"
    )
    host: str = Field("127.0.0.1", description="address it listens on; 0.0.0.0: all")
    port: int = Field(0, ge=0, le=65535, description="0: a free one")
    microbatch_tokens: PositiveInt = Field(
        20480, description="token budget of one packed micro-batch"
    )
    batch_ms: float = Field(
        5.0, ge=0, description="how long a request waits for others to fill a micro-batch"
    )
    max_queue_tokens: PositiveInt = Field(
        2**20, description="tokens of unanswered requests; further ones are told to come again"
    )
    deterministic: bool = Field(
        False,
        description="score each sequence alone: the same bits whatever else is asked, but slower",
    )
    start_timeout_s: float = Field(1800, gt=0, description="seconds until it must be ready")
    max_restarts: int = Field(3, ge=0, description="times a run starts it again after it died")

    @property
    def world(self) -> int:
        """Processes of the service's world."""
        return self.processes or self.parallel.unit


class Teacher(Frozen):
    """The model that scores: embedded, or a server where there are `urls` or a `service`.

    Of a server's model the trainer reads only tokenizer and configuration in `hf`.
    """

    urls: list[str] = Field(
        [], description="scoring servers already running: SGLang's, or 'iwopd serve-teacher'"
    )
    service: Service | None = Field(
        None,
        description="what 'iwopd serve-teacher' runs; 'iwopd train' starts it here without urls",
    )
    timeout_s: float = Field(600, gt=0, description="seconds one scoring request may take")
    patience_s: float = Field(
        1800, gt=0, description="seconds a run waits for a server when none answers"
    )
    max_in_flight: PositiveInt = Field(64, description="scoring requests at a time, all servers")

    @property
    def is_remote(self) -> bool:
        """Whether a server scores, running already or started here."""
        return bool(self.urls) or self.service is not None
