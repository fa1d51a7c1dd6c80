"""CPU stand-ins for what Megatron-Core asks of `torch.cuda`, and for its own CUDA code.

Megatron speaks to `torch.cuda` directly. With these in place the same model, schedules and
optimiser run on CPU tensors and gloo. `device.install()` decides whether they are needed.
"""

import contextlib
import pkgutil
from collections.abc import Collection

import torch
from torch.overrides import TorchFunctionMode

_CPU = torch.device("cpu")


class _CudaToCpu(TorchFunctionMode):
    """A mode that rewrites `device="cuda"`, `pin_memory=True`, Tensor.to("cuda"), Tensor.type()."""

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


def install(without: Collection[str] = ()) -> None:
    """Replace parts of torch and Megatron-Core in this process; there is no way back.

    `without` leaves some out, by name: each must be missed, or else it can go.
    """
    _CudaToCpu().__enter__()
    for make in (_torch_stand_ins, _megatron_stand_ins):  # Megatron is imported after torch's
        for path, stand_in in make().items():
            if path not in without:
                owner, name = path.rsplit(".", 1)
                setattr(pkgutil.resolve_name(owner), name, stand_in)


# New functions at each call: torch's dispatch rules refuse one object under two names.


def _constant(value=None):
    """Return a function that takes anything and returns `value`."""
    return lambda *args, **kwargs: value


def _itself():
    """Return a method that takes anything and returns the object it is called on."""
    return lambda self, *args, **kwargs: self


def _torch_stand_ins() -> dict[str, object]:
    """Return what stands for parts of torch, by full name."""
    nothing = ("set_device", "synchronize", "empty_cache", "ipc_collect", "reset_peak_memory_stats")
    zero = ("memory_allocated", "max_memory_allocated", "memory_reserved")
    random: dict[str, object] = {}
    for module in ("torch.cuda", "torch.cuda.random"):
        random |= {
            f"{module}.get_rng_state": lambda *args, **kwargs: torch.get_rng_state(),
            f"{module}.set_rng_state": lambda state, *args, **kwargs: torch.set_rng_state(state),
            f"{module}.manual_seed": lambda seed: torch.manual_seed(seed),
        }
    return {
        **{f"torch.cuda.{name}": _constant() for name in nothing},
        **{f"torch.cuda.{name}": _constant(0) for name in zero},
        "torch.cuda.current_device": lambda: _CPU,
        "torch.cuda.Stream": _Stream,
        "torch.cuda.Event": _Event,
        "torch.cuda.current_stream": _constant(_Stream()),
        "torch.cuda.default_stream": _constant(_Stream()),
        "torch.cuda.stream": lambda stream: contextlib.nullcontext(),
        **random,
        "torch.cuda.nvtx.range_push": _constant(),
        "torch.cuda.nvtx.range_pop": _constant(),
        "torch.nn.Module.cuda": _itself(),
        "torch.Tensor.cuda": _itself(),
        "torch.Tensor.pin_memory": _itself(),
        "torch.Tensor.record_stream": _constant(),
    }


def _megatron_stand_ins() -> dict[str, object]:
    """Return what stands for parts of Megatron-Core, by full name."""
    import megatron.core.tensor_parallel.mappings as mappings
    import megatron.core.transformer.moe.token_dispatcher as token_dispatcher

    def to_cpu(tensor, as_numpy=False, record_stream=False):
        # the original converts only if .is_cuda
        return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor

    sort_chunks = token_dispatcher.sort_chunks_by_idxs

    def sort_chunks_unless_sorted(x, split_sizes, order, probs=None, fused=False):
        """Megatron copies all tokens of a rank that has every expert, twice, to where they are."""
        if torch.equal(order, torch.arange(len(order))):
            return x, probs
        return sort_chunks(x, split_sizes, order, probs=probs, fused=fused)

    gather = mappings._gather_along_first_dim  # called by its global name, in mappings.py only

    def gather_along_first_dim(x, group, output_split_sizes=None, use_global_buffer=False):
        if output_split_sizes is None or group.size() == 1:
            return gather(x, group, output_split_sizes, use_global_buffer)
        longest = max(1, *output_split_sizes)  # gloo gathers equal parts only
        padded = x.new_zeros((longest, *x.shape[1:]))
        padded[: x.shape[0]] = x
        parts = gather(padded, group).split(longest)
        return torch.cat([p[:size] for p, size in zip(parts, output_split_sizes, strict=True)])

    random, moe = "megatron.core.tensor_parallel.random", "megatron.core.transformer.moe"
    return {
        f"{random}._get_cuda_rng_state": lambda *args, **kwargs: torch.get_rng_state(),
        f"{random}._set_cuda_rng_state": lambda state, *args, **kwargs: torch.set_rng_state(state),
        f"{moe}.moe_utils.maybe_move_tensor_to_cpu": to_cpu,
        f"{moe}.token_dispatcher.maybe_move_tensor_to_cpu": to_cpu,
        f"{moe}.token_dispatcher.sort_chunks_by_idxs": sort_chunks_unless_sorted,
        "megatron.core.tensor_parallel.mappings._gather_along_first_dim": gather_along_first_dim,
    }
