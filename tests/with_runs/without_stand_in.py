"""A step of a model on CPU ranks without one stand-in: without_stand_in.py NAME MODEL AXES."""

import json
import math
import sys
from pathlib import Path

import torch

from iwopd_megatron.runtime import stand_ins

sys.path.insert(0, str(Path(__file__).parents[1]))


def leave_out(name: str) -> None:
    """Have `device.install` install all but one."""
    if name == "device=":
        stand_ins._names_cuda = lambda device: False
    elif name == "Tensor.type":
        stand_ins._cuda_type = lambda name: name
    else:
        everything = stand_ins.install
        stand_ins.install = lambda is_rehearsed: everything(is_rehearsed, [name])


def tokens_stay_where_they_are() -> None:
    """Tokens sorted already are not copied."""
    import iwopd_megatron.runtime.megatron  # noqa: F401, I001  (it installs them)
    from megatron.core.transformer.moe import token_dispatcher

    x, order = torch.randn(6, 2), torch.arange(2)
    same, _ = token_dispatcher.sort_chunks_by_idxs(x, torch.tensor([2, 4]), order)
    assert same.data_ptr() == x.data_ptr(), "copied"


def step(model: Path, reference, axes: dict) -> None:
    from iwopd_megatron.config.models import Layout
    from iwopd_megatron.parity import parity

    result = parity.compare(model, reference, Layout(**axes), 40, recompute="full")
    assert not parity.failures(result, reference, "fp32"), result
    put_off = [call.__qualname__ for call, _ in torch.cuda._queued_calls]
    assert not any("set_cuda_rng_state" in name for name in put_off), "memory grows with every step"


def main(name: str, model: Path, axes: dict[str, int]) -> None:
    leave_out(name)
    from worlds import run_world

    from iwopd_megatron.parity import hf_reference

    tokens_stay_where_they_are()
    samples = hf_reference.make_samples(512, [24, 16, 32, 20], pad_id=300)
    reference = hf_reference.compute_reference(model, samples)
    ranks = math.prod(axes.values()) // axes.get("etp", 1)
    run_world(ranks, step, model, reference, axes, limit=100)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3]))
