"""The only file that knows CUDA from CPU.

Megatron-Core 0.16.1 speaks to `torch.cuda` directly. On a machine without a GPU `install()` gives
it CPU stand-ins so that the same model, schedules and optimiser run on gloo, and without
`torch.compile`; with a GPU it does nothing. This file must be imported before `megatron`, which
binds `torch.compile` while it is imported.
"""

import contextlib
import os
from collections.abc import Callable

import torch
from torch.overrides import TorchFunctionMode

if not torch.cuda.is_available():
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
_CPU = torch.device("cpu")
_installed = False


def has_gpu() -> bool:
    """Whether this process computes on a GPU."""
    return torch.cuda.is_available() and not _installed


def current_device() -> torch.device:
    """The device of this process: `cuda:LOCAL_RANK`, or the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if has_gpu() else _CPU


def gpu_count() -> int:
    """GPUs this machine offers; 0 on a CPU."""
    return torch.cuda.device_count() if has_gpu() else 0


def beside(first: int, count: int) -> dict[str, str]:
    """Environment that gives another process this machine's GPUs `first` and on.

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
    """The torch.distributed backend: NCCL for GPU and gloo for CPU tensors, or gloo alone."""
    return "cpu:gloo,cuda:nccl" if has_gpu() else "gloo"


def synchronize() -> None:
    """Wait for the device, so that a phase's time is its own."""
    if has_gpu():
        torch.cuda.synchronize()


def empty_cache() -> None:
    """Return cached blocks to the device after a model was moved off it."""
    if has_gpu():
        torch.cuda.empty_cache()


def peak_memory_bytes() -> int:
    """Largest number of bytes tensors held on the GPU so far; 0 on a CPU."""
    return torch.cuda.max_memory_allocated() if has_gpu() else 0


def grouped_mm_kernel(dtype: torch.dtype) -> Callable[..., torch.Tensor] | None:
    """torch's grouped matrix product, or None where it has none for this device and dtype."""
    public = getattr(torch.nn.functional, "grouped_mm", None)
    if not has_gpu():
        return public if dtype == torch.float32 else None
    capability, _ = torch.cuda.get_device_capability()
    if dtype != torch.bfloat16 or capability < 8:
        return None
    return public or (getattr(torch, "_grouped_mm", None) if capability == 9 else None)  # Hopper


class _CudaToCpu(TorchFunctionMode):
    """Rewrites CUDA arguments: device="cuda", pin_memory=True, Tensor.to("cuda"), Tensor.type()."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if kwargs:
            if _names_cuda(kwargs.get("device")):
                kwargs = kwargs | {"device": _CPU}
            if kwargs.get("pin_memory"):
                kwargs = kwargs | {"pin_memory": False}
            return func(*args, **kwargs)
        if func is torch.Tensor.to and _names_cuda(args[1]):  # Tensor.to("cuda", ...)
            return func(args[0], _CPU, *args[2:])
        if func is torch.Tensor.type and len(args) == 1:
            # Megatron's DDP sorts parameters by type string, e.g. "torch.cuda.FloatTensor".
            return func(*args).replace("torch.", "torch.cuda.", 1)
        return func(*args)


def plain_torch() -> contextlib.AbstractContextManager:
    """Inside, torch's arguments are not rewritten: for many small calls that never name CUDA."""
    return torch._C.DisableTorchFunction() if _installed else contextlib.nullcontext()


def _names_cuda(device: object) -> bool:
    if isinstance(device, torch.device):
        return device.type == "cuda"
    return isinstance(device, str) and device.startswith("cuda")


class _Event:
    def __init__(self, *args, **kwargs):
        pass

    def record(self, *args):
        pass

    def synchronize(self):
        pass

    def wait(self, *args):
        pass

    def query(self):
        return True

    def elapsed_time(self, other):
        return 0.0


class _Stream:
    def __init__(self, *args, **kwargs):
        pass

    def wait_stream(self, other):
        pass

    def wait_event(self, event):
        pass

    def synchronize(self):
        pass

    def record_event(self, event=None):
        return _Event()

    def __eq__(self, other):
        return isinstance(other, _Stream)

    __hash__ = object.__hash__


def _constant(value=None):
    """A new function each time: torch's dispatch rules refuse one object under two names."""
    return lambda *args, **kwargs: value


def install() -> None:
    """Give Megatron-Core CPU stand-ins for `torch.cuda`; a no-op with a GPU or when repeated."""
    global _installed
    if _installed or torch.cuda.is_available():
        return
    _installed = True
    _CudaToCpu().__enter__()
    _replace_torch_cuda()
    _replace_megatron()


def _replace_torch_cuda() -> None:
    cuda = torch.cuda
    cuda.current_device = lambda: _CPU
    for name in (
        "set_device",
        "synchronize",
        "empty_cache",
        "ipc_collect",
        "reset_peak_memory_stats",
    ):
        setattr(cuda, name, _constant())
    for name in ("memory_allocated", "max_memory_allocated", "memory_reserved"):
        setattr(cuda, name, _constant(0))
    cuda.Stream, cuda.Event = _Stream, _Event
    cuda.current_stream, cuda.default_stream = _constant(_Stream()), _constant(_Stream())
    cuda.stream = lambda stream: contextlib.nullcontext()
    cuda.nvtx.range_push, cuda.nvtx.range_pop = _constant(), _constant()
    for module in (cuda, cuda.random):
        module.get_rng_state = lambda *args, **kwargs: torch.get_rng_state()
        module.set_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
        module.manual_seed = lambda seed: torch.manual_seed(seed)
    torch.Tensor.cuda = lambda self, *args, **kwargs: self
    torch.nn.Module.cuda = lambda self, *args, **kwargs: self
    torch.Tensor.pin_memory = lambda self, *args, **kwargs: self
    torch.Tensor.record_stream = _constant()


def _replace_megatron() -> None:
    import megatron.core.tensor_parallel.mappings as mappings
    import megatron.core.tensor_parallel.random as random
    import megatron.core.transformer.moe.moe_utils as moe_utils
    import megatron.core.transformer.moe.token_dispatcher as token_dispatcher

    random._get_cuda_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    random._set_cuda_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)

    def to_cpu(
        tensor, as_numpy=False, record_stream=False
    ):  # the original converts only if .is_cuda
        return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor

    moe_utils.maybe_move_tensor_to_cpu = to_cpu
    token_dispatcher.maybe_move_tensor_to_cpu = to_cpu

    sort_chunks = token_dispatcher.sort_chunks_by_idxs

    def sort_chunks_unless_sorted(x, split_sizes, order, probs=None, fused=False):
        """Megatron copies all tokens of a rank that has every expert, twice, to where they are."""
        if torch.equal(order, torch.arange(len(order))):
            return x, probs
        return sort_chunks(x, split_sizes, order, probs=probs, fused=fused)

    token_dispatcher.sort_chunks_by_idxs = sort_chunks_unless_sorted

    gather = mappings._gather_along_first_dim  # called by its global name, in mappings.py only

    def gather_along_first_dim(x, group, output_split_sizes=None, use_global_buffer=False):
        if output_split_sizes is None or group.size() == 1:
            return gather(x, group, output_split_sizes, use_global_buffer)
        longest = max(1, *output_split_sizes)  # gloo gathers equal parts only
        padded = x.new_zeros((longest, *x.shape[1:]))
        padded[: x.shape[0]] = x
        parts = gather(padded, group).split(longest)
        return torch.cat([p[:size] for p, size in zip(parts, output_split_sizes, strict=True)])

    mappings._gather_along_first_dim = gather_along_first_dim
