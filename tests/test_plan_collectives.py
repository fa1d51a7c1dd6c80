"""The planner's collectives of a layer against those that Megatron issues in a real world."""

from collections import Counter

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from worlds import run_world

from iwopd_megatron.batch.objective import DistillationObjective
from iwopd_megatron.batch.packing import Packer
from iwopd_megatron.batch.trajectory import Trajectory
from iwopd_megatron.config.loss import Loss
from iwopd_megatron.config.models import Layout
from iwopd_megatron.config.recipe import Train
from iwopd_megatron.hf.config import read_hf_config
from iwopd_megatron.models.actor import Schedule
from iwopd_megatron.models.gpt import build_model, wrap_precision
from iwopd_megatron.models.optimizer import build_optimizer, wrap_data_parallel
from iwopd_megatron.plan.hardware import Gpu, Rates
from iwopd_megatron.plan.model_size import ModelSize
from iwopd_megatron.plan.time import Workload, _sequence_parallel
from iwopd_megatron.plan.traffic import dispatches
from iwopd_megatron.runtime.parallel import initialise, shutdown

RECOMPUTE = None, "none", "selective", "full"  # None: scoring
UNIT = Gpu(memory=1, tflops=1, hbm=1, nvlink=1, network=1)


class Collectives(TorchDispatchMode):
    """Calls and bytes sent by (operation, dtype, width of a row)."""

    def __init__(self):
        super().__init__()
        self.calls, self.sent = Counter(), Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = str(function)
        if name.startswith("c10d."):
            sent = [x for x in tree_leaves(args[1]) if isinstance(x, torch.Tensor)]
            for tensor in sent if name.split(".")[1] != "allreduce_" else ():
                width = tensor.shape[-1] if tensor.dim() > 1 else 1
                key = name.split(".")[1].strip("_"), str(tensor.dtype)[6:], width
                self.calls[key] += 1
                self.sent[key] += tensor.nbytes
        return function(*args, **(kwargs or {}))


def collectives(hf, axes, recompute):
    """Those of one micro-batch of 128 tokens, and that many tokens."""
    parallel = initialise(Layout(**axes))
    chunks = wrap_precision(build_model(hf, parallel, "bf16", recompute or "none"))
    known = [-1.0] * 25
    samples = [
        Trajectory(i, [5] * 8, [7 + i] * 25, known, known) for i in range(4 * parallel.dp.size)
    ]
    packer = Packer(parallel, 128)
    if recompute is None:
        with Collectives() as found:
            Schedule(chunks, parallel).score(samples, packer)
        return found
    wrapped = wrap_data_parallel(chunks, Train())
    schedule, optimizer = Schedule(wrapped, parallel), build_optimizer(wrapped, Train())
    with Collectives() as found:
        schedule.accumulate(optimizer, *packer(samples), DistillationObjective(Loss(), None))
    return found


def check_dispatch(folder):
    hf, problems = read_hf_config(folder), []
    for recompute in RECOMPUTE:
        found = collectives(hf, {"ep": 2}, recompute)
        times, layers = dispatches(recompute), hf.num_hidden_layers
        hidden = "alltoall_base", "bfloat16", hf.hidden_size
        probs = "alltoall_base", "float32", 1
        expected = {hidden: 2 * times * layers, probs: times * layers}
        calls = {key: n for key, n in found.calls.items() if key[0] == "alltoall_base"}
        is_small = found.sent[probs] < 2 * found.sent[hidden] / hf.hidden_size
        if calls != expected or not is_small:
            problems.append((recompute, calls, expected, found.sent))
    shutdown()
    assert not problems, problems


def test_tokens_are_dispatched_as_often_as_planned(moe_folder):
    run_world(2, check_dispatch, moe_folder)


def check_parallel(folders):
    problems = []
    for folder in folders:
        hf = read_hf_config(folder)
        for recompute in RECOMPUTE:
            found = collectives(hf, {"tp": 2}, recompute)
            layout = Layout(tp=2)
            wide = "bfloat16", hf.hidden_size
            gathered = found.sent["allgather_base", *wide]
            scattered = found.sent["reduce_scatter_base", *wide] / 2
            moved = (gathered + scattered) / hf.num_hidden_layers
            rates = Rates(link=1)
            load = Workload(ModelSize.of(hf), layout, UNIT, 128, 32, rates=rates)
            planned = _sequence_parallel(load, 128, recompute)
            # embedding, head and final norm have a collective or two of their own
            once = 4 * 2 * hf.hidden_size * 64 / hf.num_hidden_layers
            if not planned <= moved <= planned + once:
                problems.append((str(folder), recompute, moved, planned))
    shutdown()
    assert not problems, problems


def test_sequences_are_gathered_as_often_as_planned(moe_folder, dense_folder):
    run_world(2, check_parallel, (moe_folder, dense_folder))
