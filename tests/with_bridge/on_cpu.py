"""CPU stand-ins for what the bridges ask of torch.cuda: the project's own, and a few more."""

import torch

from iwopd_megatron.runtime import stand_ins

NOTHING = ("set_device", "empty_cache", "reset_peak_memory_stats")


_to = torch.Tensor.to


def _to_cpu(tensor, *args, **kwargs):
    """Tensor.to, of which "cuda" is the CPU."""
    return _to(tensor, *("cpu" if str(x).startswith("cuda") else x for x in args), **kwargs)


def install() -> None:
    """Replace parts of torch and Megatron-Core in this process."""
    torch.Tensor.to = _to_cpu
    for name in NOTHING:
        setattr(torch.cuda, name, lambda *args, **kwargs: None)
    torch.nn.Module.cuda = lambda module, *args, **kwargs: module
    stand_ins.install()
