"""Environment variables by hardware, layout and role: one table, each row with its reason.

Taken from what the makers of Megatron-LM, TransformerEngine and NCCL document and their recipes
set; none was measured by this project, which had no GPUs. A profile's `env` overrides any of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from iwopd_megatron.config.models import Layout

GENERATION = {
    "a100": "ampere",
    "h20": "hopper",
    "h100-80": "hopper",
    "h200": "hopper",
    "b200": "blackwell",
    "cpu": "cpu",
}


@dataclass(frozen=True)
class RoleHardware:
    """A role's GPUs and layout, which decide its variables. `layout`: None for rollout servers."""

    gpu: str
    layout: Layout | None

    @property
    def generation(self) -> str:
        """Return the architecture of its GPUs, e.g. hopper; cpu where it has none."""
        return GENERATION[self.gpu]

    @property
    def is_megatron(self) -> bool:
        """Return whether its processes are ranks of a Megatron world on GPUs."""
        return self.layout is not None and self.generation != "cpu"

    @property
    def has_tensor_parallel(self) -> bool:
        """Return whether it is a Megatron world on GPUs that cuts layers over ranks."""
        return self.is_megatron and self.layout is not None and self.layout.tp > 1

    @property
    def has_pipeline_parallel(self) -> bool:
        """Return whether it is a Megatron world on GPUs whose ranks hold different layers."""
        return self.is_megatron and self.layout is not None and self.layout.pp > 1

    @property
    def has_context_parallel(self) -> bool:
        """Return whether it is a Megatron world on GPUs that cuts sequences over ranks."""
        return self.is_megatron and self.layout is not None and self.layout.cp > 1

    @property
    def must_order_kernels(self) -> bool:
        """Return whether communication must start before the matrix product that hides it.

        Megatron overlaps tp and cp communication that way up to Hopper.
        """
        is_old = self.generation in ("ampere", "hopper")
        return is_old and (self.has_tensor_parallel or self.has_context_parallel)


@dataclass(frozen=True)
class Row:
    """A variable, its value, why, and the roles it holds for."""

    name: str
    value: str
    reason: str
    holds: Callable[[RoleHardware], bool]


ROWS = (
    Row("PYTHONUNBUFFERED", "1", "a killed process's last lines are in the log", lambda p: True),
    Row("TTY_COMPATIBLE", "0", "srun's unbuffered output is a pseudo-terminal; a log needs lines",
        lambda p: True),
    Row("TOKENIZERS_PARALLELISM", "false", "tokenizers' threads and fork() deadlock",
        lambda p: True),
    Row("HF_HUB_OFFLINE", "1", "models are folders; a thousand ranks must not ask a hub",
        lambda p: True),
    Row("OMP_NUM_THREADS", "1", "ranks share a node's cores; one thread each",
        lambda p: p.layout is not None),
    Row("CUDA_DEVICE_MAX_CONNECTIONS", "1",
        "one hardware queue: with tp or cp, communication is launched before the product it hides "
        "behind and must start first", lambda p: p.must_order_kernels),
    Row("CUDA_DEVICE_MAX_CONNECTIONS", "32",
        "Blackwell orders kernels itself; more queues let expert exchange overlap",
        lambda p: p.is_megatron and p.generation == "blackwell"),
    Row("CUDA_DEVICE_MAX_CONNECTIONS", "8", "no tp or cp to order: CUDA's default, said aloud",
        lambda p: p.is_megatron and p.generation != "blackwell" and not p.must_order_kernels),
    Row("TORCH_NCCL_AVOID_RECORD_STREAMS", "1",
        "tensors of asynchronous collectives are freed at once, not when the allocator notices",
        lambda p: p.is_megatron),
    Row("TORCH_NCCL_HIGH_PRIORITY", "1", "communication kernels go before queued products",
        lambda p: p.is_megatron),
    Row("NCCL_NVLS_ENABLE", "0",
        "NVLink SHARP takes GPU memory for each of Megatron's many communicators",
        lambda p: p.is_megatron),
    Row("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True",
        "packed micro-batches differ in length, which fragments fixed segments",
        lambda p: p.is_megatron),
    Row("NCCL_GRAPH_REGISTER", "0", "NCCL cannot register expandable segments",
        lambda p: p.is_megatron),
    Row("NCCL_P2P_NET_CHUNKSIZE", "2097152",
        "pipeline stages exchange few large messages; larger chunks fill the network",
        lambda p: p.has_pipeline_parallel),
    Row("NVTE_FWD_LAYERNORM_SM_MARGIN", "16",
        "TransformerEngine's norms leave multiprocessors to the communication beside them",
        lambda p: p.has_tensor_parallel),
    Row("NVTE_BWD_LAYERNORM_SM_MARGIN", "16", "as forward", lambda p: p.has_tensor_parallel),
)  # fmt: skip


def rows(gpu: str, layout: Layout | None) -> list[Row]:
    """Return the rows that hold for a role; no two have one name.

    gpu: a key of GENERATION; layout: of the role's Megatron world, None for rollout servers.
    """
    hardware = RoleHardware(gpu, layout)
    return [row for row in ROWS if row.holds(hardware)]


def variables(gpu: str, layout: Layout | None) -> dict[str, str]:
    """Return the rows of `rows` as an environment."""
    return {row.name: row.value for row in rows(gpu, layout)}
