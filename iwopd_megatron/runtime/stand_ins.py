"""CPU stand-ins for what Megatron-Core asks of `torch.cuda`, and for its own CUDA code.

Megatron speaks to `torch.cuda` directly. With these in place the same model, schedules and
optimiser run on CPU tensors and gloo. `device.install()` decides whether they are needed.
"""

import pkgutil
from collections.abc import Callable, Collection

import torch
from torch.overrides import TorchFunctionMode

_CPU = torch.device("cpu")


class _CudaToCpu(TorchFunctionMode):
    """A mode that rewrites `device="cuda"` and what Tensor.type() says."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if kwargs:
            if _names_cuda(kwargs.get("device")):
                kwargs = kwargs | {"device": _CPU}
            return func(*args, **kwargs)
        if func is torch.Tensor.type and len(args) == 1:
            return _cuda_type(func(*args))
        return func(*args)


def _names_cuda(device: object) -> bool:
    if isinstance(device, torch.device):
        return device.type == "cuda"
    return isinstance(device, str) and device.startswith("cuda")


def _cuda_type(name: str) -> str:
    """Return the type string that Megatron's DDP sorts parameters by: "torch.cuda.FloatTensor"."""
    return name.replace("torch.meta.", "torch.").replace("torch.", "torch.cuda.", 1)


class _Stream:
    """A stream, and an event in it: all that is asked of it is done when the call returns."""

    def wait_stream(self, other):
        pass

    def record_event(self):
        return self

    def synchronize(self):
        pass


def install(
    is_rehearsed: Callable[[], bool] = lambda: False, without: Collection[str] = ()
) -> None:
    """Replace parts of torch and Megatron-Core in this process; there is no way back.

    `without` leaves some out, by name: each must be missed, or else it can go.
    """
    _CudaToCpu().__enter__()
    # Megatron is imported after torch's
    for make in (torch_parts, lambda: megatron_parts(is_rehearsed)):
        for path, stand_in in make().items():
            if path not in without:
                owner, name = path.rsplit(".", 1)
                setattr(pkgutil.resolve_name(owner), name, stand_in)


def torch_parts() -> dict[str, object]:
    """Return what stands for parts of torch, by full name."""
    return {
        "torch.cuda.current_device": lambda: _CPU,
        "torch.cuda.synchronize": lambda: None,  # in Megatron's own save and refit
        "torch.cuda.Stream": _Stream,
        "torch.cuda.current_stream": _Stream,
        "torch.cuda.get_rng_state": lambda: torch.get_rng_state(),
        "torch.Tensor.cuda": lambda tensor: tensor,
    }


def megatron_parts(is_rehearsed: Callable[[], bool] = lambda: False) -> dict[str, object]:
    """Return what stands for parts of Megatron-Core, by full name.

    is_rehearsed: says whether a GPU's own are to run, on tensors without memory.
    """
    import megatron.core.tensor_parallel.mappings as mappings
    import megatron.core.transformer.moe.token_dispatcher as token_dispatcher

    def to_cpu(tensor, as_numpy=False, record_stream=False):
        # the original converts only if .is_cuda
        return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor

    sort_chunks = token_dispatcher.sort_chunks_by_idxs

    def sort_chunks_unless_sorted(x, split_sizes, order, probs=None, fused=False):
        """Megatron copies all tokens of a rank that has every expert, twice, to where they are."""
        if not is_rehearsed() and torch.equal(order, torch.arange(len(order))):
            return x, probs
        return sort_chunks(x, split_sizes, order, probs=probs, fused=fused)

    gather = mappings._gather_along_first_dim  # called by its global name, in mappings.py only

    def gather_along_first_dim(x, group, output_split_sizes=None, use_global_buffer=False):
        if output_split_sizes is None or group.size() == 1 or is_rehearsed():
            return gather(x, group, output_split_sizes, use_global_buffer)
        longest = max(1, *output_split_sizes)  # gloo gathers equal parts only
        padded = x.new_zeros((longest, *x.shape[1:]))
        padded[: x.shape[0]] = x
        parts = gather(padded, group).split(longest)
        return torch.cat([p[:size] for p, size in zip(parts, output_split_sizes, strict=True)])

    random = "megatron.core.tensor_parallel.random"
    dispatcher = "megatron.core.transformer.moe.token_dispatcher"
    return {
        f"{random}._get_cuda_rng_state": lambda *args, **kwargs: torch.get_rng_state(),
        # without CUDA torch keeps every call, with its stack, for when there is some
        f"{random}._set_cuda_rng_state": lambda state, *args, **kwargs: torch.set_rng_state(state),
        f"{dispatcher}.maybe_move_tensor_to_cpu": to_cpu,
        f"{dispatcher}.sort_chunks_by_idxs": sort_chunks_unless_sorted,
        "megatron.core.tensor_parallel.mappings._gather_along_first_dim": gather_along_first_dim,
    }
