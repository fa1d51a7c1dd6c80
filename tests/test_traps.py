"""Four ways Megatron-Core silently trains wrongly; each fix, removed, must be missed.

`parity` finds the first three: the test fails if it no longer does. The fourth refuses to save.
"""

import os

import pytest
from worlds import run_world

from iwopd_megatron.config.models import Layout
from iwopd_megatron.config.recipe import Train
from iwopd_megatron.hf.config import read_hf_config
from iwopd_megatron.models import experts
from iwopd_megatron.models import gpt as model
from iwopd_megatron.models.optimizer import build_optimizer, build_scheduler, wrap_data_parallel
from iwopd_megatron.parity import hf_reference, parity
from iwopd_megatron.runtime.local_world import local_context
from iwopd_megatron.runtime.parallel import initialise, shutdown
from iwopd_megatron.train import checkpoint
from iwopd_megatron.train.saver import Saver
from iwopd_megatron.weights.hf_reader import HfTensors, load_shards

LENGTHS = [24, 16, 32, 20, 28, 12, 24, 32]


def without_setting(**settings):
    """The project's TransformerConfig with some of its settings changed back."""
    original = model.transformer_config

    def changed(*args):
        config = original(*args)
        for name, value in settings.items():
            setattr(config, name, value)
        return config

    model.transformer_config = changed


def expert_gradients_reduced_over_the_wrong_ranks():
    model.mark_expert_parameters = lambda chunk: None


def shards_not_marked_as_shards():
    """Megatron marks its own (0.16 while it initialises them); experts.py marks the experts'."""
    mark = experts.mark_parameter

    def mark_but(parameter, **marks):
        marks.pop("tensor_model_parallel", None)
        mark(parameter, **marks)

    experts.mark_parameter = mark_but


def neighbours_swap_messages():
    without_setting(batch_p2p_comm=True)


# (what removes the fix, a layout it matters in, the figure that must be far off)
TRAPS = {
    "expert gradients": (expert_gradients_reduced_over_the_wrong_ranks, {"tp": 2}, "grads", 1e-3),
    "gradient norm": (shards_not_marked_as_shards, {"tp": 2, "etp": 2}, "grad_norm_error", 1e-2),
    "interleaved pipeline": (neighbours_swap_messages, {"pp": 2, "vpp": 2}, "grads", 1e-3),
}


def remove_fix_and_compare(remove, folder, reference, axes, queue):
    remove()
    result = parity.compare(folder, reference, Layout(**axes), 40)
    if os.environ["RANK"] == "0":
        queue.put((result, parity.failures(result, reference, "fp32")))
    shutdown()


@pytest.mark.parametrize("name", TRAPS)
def test_parity_notices_a_missing_fix(name, moe_folder):
    remove, axes, figure, at_least = TRAPS[name]
    reference = hf_reference.compute_reference(
        moe_folder, hf_reference.make_samples(512, LENGTHS, pad_id=300)
    )
    queue = local_context().SimpleQueue()
    run_world(2, remove_fix_and_compare, remove, moe_folder, reference, axes, queue)
    result, problems = queue.get()
    assert result[figure] > at_least
    assert problems


def save_and_load(folder, run, metadata, queue):
    parallel = initialise(Layout(ep=2))
    hf = read_hf_config(folder)
    chunks = model.build_model(hf, parallel)
    load_shards(chunks, HfTensors(folder), hf, parallel)
    train = Train(rounds=4)
    wrapped = wrap_data_parallel(chunks, train)
    optimizer = build_optimizer(wrapped, train)
    scheduler = build_scheduler(optimizer, train)
    optimizer.step()
    checkpoint.METADATA.update(metadata)
    problem = ""
    try:
        extra = {"world": 2, "round": 1}
        checkpoint.save(
            Saver(run, 1, False, parallel), wrapped, optimizer, scheduler, extra, parallel
        )
        checkpoint.load(
            checkpoint.newest(run, parallel, print), wrapped, optimizer, scheduler, parallel
        )
    except Exception as error:
        problem = str(error)
    if parallel.is_main:
        queue.put(problem)


@pytest.mark.parametrize("is_fixed", [True, False])
def test_megatrons_default_optimizer_format_cannot_be_saved(is_fixed, moe_folder, tmp_path):
    metadata = {} if is_fixed else {"distrib_optim_sharding_type": "fully_sharded_model_space"}
    queue = local_context().SimpleQueue()
    run_world(2, save_and_load, moe_folder, tmp_path, metadata, queue)
    problem = queue.get()
    assert (problem == "") if is_fixed else ("flattened_range" in problem), problem
