"""After a step nothing but the model's own tensors is alive; hidden states keep their dtype."""

import gc
import time
from collections import Counter

import numpy
import pytest
import torch
from live_bytes import LiveBytes
from worlds import run_world

from iwopd_megatron.batch.objective import DistillationObjective
from iwopd_megatron.batch.packing import Packer
from iwopd_megatron.batch.routing import RoutingReplay
from iwopd_megatron.batch.trajectory import Trajectory
from iwopd_megatron.config.loss import Loss
from iwopd_megatron.config.models import Layout
from iwopd_megatron.config.recipe import Train
from iwopd_megatron.hf.config import read_hf_config
from iwopd_megatron.models import gpt
from iwopd_megatron.models.actor import Schedule
from iwopd_megatron.models.gpt import DTYPES, build_model, wrap_precision
from iwopd_megatron.models.optimizer import build_optimizer, wrap_data_parallel
from iwopd_megatron.models.router_load import RouterLoad
from iwopd_megatron.runtime.megatron import Float16Module, model_parallel_cuda_manual_seed
from iwopd_megatron.runtime.parallel import initialise, shutdown

RECOMPUTE = "none", "selective", "full"
DISPATCHERS = "alltoall", "allgather"
LAYOUTS = [
    (1, {}, "fp32", DISPATCHERS),
    (1, {}, "bf16", DISPATCHERS[:1]),
    (2, {"ep": 2}, "fp32", DISPATCHERS),
    (2, {"tp": 2}, "bf16", DISPATCHERS[:1]),
    (2, {"pp": 2}, "fp32", DISPATCHERS[:1]),
    (2, {"pp": 2, "vpp": 2}, "fp32", DISPATCHERS[:1]),
]


def trajectories(layers: int) -> list[Trajectory]:
    """Samples of 43 tokens along given experts."""
    draw = numpy.random.default_rng(0)
    known = [-1.0] * 40
    return [
        Trajectory(
            i, [5] * 4, [7] * 40, known, known,
            experts=draw.integers(0, 8, (43, layers, 1), dtype=numpy.uint8)
            + numpy.array([0, 1], dtype=numpy.uint8) * 3 & 7,
        )
        for i in range(4)
    ]  # fmt: skip


def check_forgotten(folder, layouts):
    hf, problems = read_hf_config(folder), []
    for axes, dtype, dispatchers in layouts:
        parallel = initialise(Layout(**axes))
        for dispatcher in dispatchers:
            for recompute in RECOMPUTE:
                further = {"moe_token_dispatcher_type": dispatcher}
                chunks = wrap_precision(build_model(hf, parallel, dtype, recompute, further))
                wrapped = wrap_data_parallel(chunks, Train())
                optimizer = build_optimizer(wrapped, Train())
                load = RouterLoad(wrapped, hf.num_hidden_layers, hf.num_experts)
                schedule = Schedule(wrapped, parallel, 1.0, RoutingReplay(wrapped), load)
                samples = trajectories(hf.num_hidden_layers)
                for task in (train, score):
                    task(schedule, optimizer, samples)  # makes Megatron's buffers, which stay
                    with LiveBytes() as live:
                        task(schedule, optimizer, samples)
                    if kept := summary(live):
                        name = task.__name__
                        problems.append((name, axes, dtype, dispatcher, recompute, kept))
    shutdown()
    assert not problems, "\n".join(map(str, problems))


def train(schedule, optimizer, samples):
    """Make the gradients of two micro-batches."""
    batches, length = Packer(schedule.parallel, 96)(samples)
    with schedule.load.counting():
        schedule.accumulate(optimizer, batches, length, DistillationObjective(Loss(), None))


def score(schedule, _, samples):
    schedule.score(samples, Packer(schedule.parallel, 96), topk=2)


def summary(live):
    """What is alive, but 64 bytes or less: counts by expert, on the host, and the loss scale."""
    gc.collect()
    for _ in range(100):  # gloo's thread lets go of its tensors a moment later
        counts = Counter(made for made in list(live.made.values()) if made.size > 64)
        if not counts:
            break
        time.sleep(0.01)
    return [f"{number} x {made}" for made, number in counts.items()]


def check_dtype(folder, dtype):
    hf, parallel = read_hf_config(folder), initialise(Layout())
    found = {}
    for wrapper in (gpt.HalfPrecisionModel, Float16Module):
        torch.manual_seed(0)
        model_parallel_cuda_manual_seed(0, force_reset_rng=True)
        gpt.HalfPrecisionModel = wrapper
        wrapped = wrap_data_parallel(wrap_precision(build_model(hf, parallel, dtype)), Train())
        optimizer, dtypes = build_optimizer(wrapped, Train()), []
        own = Schedule.loss_of

        def loss_of(schedule, objective, own=own, dtypes=dtypes):
            def on_output(hidden, *rest):
                dtypes.append(hidden.dtype)
                return own(schedule, objective)(hidden, *rest)

            return on_output

        Schedule.loss_of = loss_of
        batches, length = Packer(parallel, 96)(trajectories(hf.num_hidden_layers))
        objective = DistillationObjective(Loss(), None)
        Schedule(wrapped, parallel).accumulate(optimizer, batches, length, objective)
        Schedule.loss_of = own
        found[wrapper.__name__] = dtypes, [p.main_grad for p in wrapped[0].parameters()]
    shutdown()
    (ours, gradients), (_, reference) = found.values()
    assert set(ours) == {DTYPES[dtype]}
    assert any(gradient.any() for gradient in gradients)
    for gradient, expected in zip(gradients, reference, strict=True):
        assert torch.equal(gradient, expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_last_hidden_states_keep_their_dtype_and_gradients_their_bits(dtype, moe_folder):
    run_world(1, check_dtype, moe_folder, dtype)


@pytest.mark.parametrize("world", [1, 2])
def test_nothing_that_a_step_made_outlives_it(world, moe_folder):
    layouts = [rest for size, *rest in LAYOUTS if size == world]
    run_world(world, check_forgotten, moe_folder, layouts)
