"""Which device this process computes on; the only file that other code asks.

On a machine without a GPU `install()` puts CPU stand-ins (stand_ins.py) in the place of
`torch.cuda`, and `torch.compile` is switched off. Megatron binds both while it is imported, so
`megatron` imports this file first.
"""

import contextlib
import os
from collections.abc import Callable, Iterator

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
GPU, CPU = "cuda", "cpu"  # torch's names of the types, for operators
_CPU = torch.device(CPU)
_installed = False
_as_gpu = False


def has_gpu() -> bool:
    """Return whether this process computes on a GPU."""
    return torch.cuda.is_available() and not _installed


def has_gpu_kernels() -> bool:
    """Return whether tiles, kernels and copies are a GPU's: on one, or while one is rehearsed."""
    return _as_gpu or has_gpu()


def is_rehearsed() -> bool:
    """Return whether a GPU is rehearsed: tensors have shapes, and are on no GPU."""
    return _as_gpu


@contextlib.contextmanager
def as_gpu() -> Iterator[None]:
    """Choose what a GPU would be given inside, for tensors without memory (room rehearsal)."""
    global _as_gpu
    before, _as_gpu = _as_gpu, True
    try:
        yield
    finally:
        _as_gpu = before


def current_device() -> torch.device:
    """Return the device of this process: the GPU that `set_device` chose, or the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if has_gpu() else _CPU


def gpu_count() -> int:
    """Return the number of GPUs that this process sees; 0 on a CPU."""
    return torch.cuda.device_count() if has_gpu() else 0


def beside(first: int, count: int) -> dict[str, str]:
    """Return the environment that gives another process `count` GPUs, from number `first` on.

    {} without a GPU, and where there are not as many: then it sees all that this process sees.
    """
    if not has_gpu() or gpu_count() < first + count:
        return {}
    name = "CUDA_VISIBLE_DEVICES"
    visible = os.environ.get(name, ",".join(map(str, range(gpu_count())))).split(",")
    return {name: ",".join(visible[first : first + count])}


def set_device(local_rank: int) -> None:
    """Bind this process to its GPU, with fp32 matrix products in full fp32 (no TF32)."""
    if has_gpu():
        torch.cuda.set_device(local_rank)
        torch.backends.cuda.matmul.allow_tf32 = False
        torch.backends.cudnn.allow_tf32 = False


def dist_backend() -> str:
    """Return the torch.distributed backend: NCCL for GPU, gloo for CPU tensors; or gloo alone."""
    return "cpu:gloo,cuda:nccl" if has_gpu() else "gloo"


def synchronize() -> None:
    """Wait until the device has done what was asked of it, so that clocks are right."""
    if has_gpu():
        torch.cuda.synchronize()


def empty_cache() -> None:
    """Return cached blocks to the device after a model was moved off it."""
    if has_gpu():
        torch.cuda.empty_cache()


def peak_memory_bytes() -> int:
    """Return the most bytes that tensors held on the GPU so far; 0 on a CPU."""
    return torch.cuda.max_memory_allocated() if has_gpu() else 0


def grouped_mm_kernel(dtype: torch.dtype) -> Callable[..., torch.Tensor] | None:
    """Return torch's grouped matrix product; None where it has none for device and dtype."""
    public = getattr(torch.nn.functional, "grouped_mm", None)
    if is_rehearsed():
        return public if dtype == torch.bfloat16 else None
    if not has_gpu():
        return public if dtype == torch.float32 else None
    capability, _ = torch.cuda.get_device_capability()
    if dtype != torch.bfloat16 or capability < 8:
        return None
    return public or (getattr(torch, "_grouped_mm", None) if capability == 9 else None)  # Hopper


def plain_torch() -> contextlib.AbstractContextManager:
    """Return a context in which no argument of torch is rewritten.

    For many small calls that never name CUDA: each is spared the stand-ins' look at it.
    """
    return torch._C.DisableTorchFunction() if _installed else contextlib.nullcontext()


def install() -> None:
    """Give Megatron-Core CPU stand-ins for `torch.cuda`; a no-op with a GPU or when repeated."""
    global _installed
    if _installed or torch.cuda.is_available():
        return
    _installed = True
    from iwopd_megatron.runtime import stand_ins

    stand_ins.install(is_rehearsed)
