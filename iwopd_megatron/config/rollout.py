"""The recipe's rollout section: who writes the answers, and how."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from iwopd_megatron.config.models import PositiveInt, Section


class Servers(Section):
    """Rollout servers: `urls` of running ones, or `start` new ones on this machine."""

    urls: list[str] = Field([], description="servers already running, e.g. http://node7:30000")
    start: int = Field(0, ge=0, description="without urls: servers that iwopd starts and restarts")
    tp: PositiveInt = Field(1, description="tensor-parallel size of a started server")
    gpu_memory_fraction: float = Field(
        0.85, gt=0, lt=1, description="share of a GPU's memory a started server takes"
    )
    python: Path | None = Field(
        None, description="Python that has the engine; default: the one iwopd runs on"
    )
    args: dict[str, str | int | float | bool | None] = Field(
        {}, description="more command-line options of a started server, without --; true: a switch"
    )
    env: dict[str, str] = Field({}, description="environment variables of a started server")
    max_running: PositiveInt = Field(256, description="requests in flight at each server")
    max_restarts: int = Field(3, ge=0, description="times a started server that died is restarted")
    ready_timeout_s: float = Field(1800, gt=0, description="seconds until a server must be ready")
    request_timeout_s: float = Field(3600, gt=0, description="seconds one answer may take")
    hang_timeout_s: float = Field(
        60, gt=0, description="seconds after which a server that answers nothing is given up"
    )


class Rollout(Section):
    """The engine, its servers, how weights reach them, and how answers are sampled."""

    engine: Literal["hf", "sglang", "vllm"] = Field(
        "hf", description="hf: embedded, split over the ranks; sglang, vllm: see servers"
    )
    servers: Servers = Servers()
    sync: Literal["disk", "tensor", "distributed"] = Field(
        "disk",
        description="how servers get new weights: from a shared folder, in requests, or by "
        "broadcast (NCCL; gloo on CPUs)",
    )
    sync_folder: Path | None = Field(
        None, description="sync=disk: folder that trainer and servers share; default: OUT/weights"
    )
    sync_address: str = Field(
        "127.0.0.1", description="sync=distributed: address of rank 0 as the servers see it"
    )
    pause: Literal["retract", "in_place"] = Field(
        "retract",
        description="answers in flight while weights change: recompute their cache under the new "
        "ones, or keep it",
    )
    verify_every: PositiveInt = Field(
        10,
        description="rounds between proofs that servers hold the trainer's weights: checksums of "
        "every tensor, and the log-probs of a canary prompt (always the first time)",
    )
    max_staleness: Literal[0, 1] = Field(
        0, description="1: the next round is generated while this one trains"
    )
    stream_scoring: bool = Field(
        True, description="score an answer as soon as it ends; false: when all of a round have"
    )
    routing_replay: bool = Field(
        False, description="train through the experts that the engine chose (sglang, MoE student)"
    )
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
    batch_size: PositiveInt = Field(
        512, description="engine=hf: prompts one rank generates for at a time"
    )
    # A process's OMP_NUM_THREADS cannot say it: quiet.py, torchrun and launchers make it 1.
    threads: PositiveInt | None = Field(
        None,
        description="engine=hf on CPUs: threads that a rank decodes with; default: its share of "
        "the cores that the run may use",
    )
    bf16_products: bool = Field(
        False,
        description="engine=hf on CPUs, fp32 student: answers are written with weights rounded to "
        "bf16 (routed experts and LM head excepted); about twice as fast with AMX",
    )
