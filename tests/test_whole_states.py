"""Checkpoints without copies: what is saved is where it lies, and is what Megatron would save."""

import pytest
import torch
from worlds import run_world

from iwopd_megatron.batch.packing import Packer
from iwopd_megatron.config.models import Frozen, Layout
from iwopd_megatron.config.recipe import Train
from iwopd_megatron.hf.config import read_hf_config
from iwopd_megatron.models import optimizer as optimizers
from iwopd_megatron.models.gpt import build_model
from iwopd_megatron.models.optimizer import build_optimizer, wrap_data_parallel
from iwopd_megatron.runtime.megatron import megatron_distributed
from iwopd_megatron.runtime.parallel import initialise, shutdown
from iwopd_megatron.teacher.embedded import EmbeddedScorer
from iwopd_megatron.train import saver as savers
from iwopd_megatron.train.checkpoint import sharded_state
from iwopd_megatron.train.saver import Saver
from iwopd_megatron.train.sharded_save import ShardedSave
from iwopd_megatron.weights.hf_reader import HfTensors, load_shards
from iwopd_megatron.weights.torch_dist.writer import METADATA


def trained(folder, dtype="fp32", steps=2):
    """A model with optimiser states of a few steps on made-up gradients."""
    parallel, hf = initialise(Layout()), read_hf_config(folder)
    chunks = build_model(hf, parallel, dtype)
    load_shards(chunks, HfTensors(folder), hf, parallel)
    wrapped = wrap_data_parallel(chunks, Train(lr=1e-2))
    optimizer = build_optimizer(wrapped, Train(lr=1e-2))
    generator = torch.Generator().manual_seed(3)
    for _ in range(steps):
        for parameter in wrapped[0].parameters():
            parameter.main_grad.copy_(torch.randn(parameter.shape, generator=generator))
        optimizer.prepare_grads()
        optimizer.step()
    return parallel, wrapped, optimizer


def pieces(states):
    return {(i, name): piece for i, one in states.items() for name, piece in one.items()}


def check_states(folder, dtype):
    """Megatron's own method on the class against the one that this optimiser was given."""
    parallel, wrapped, optimizer = trained(folder, dtype)
    metadata = METADATA | {"dp_cp_group": parallel.dp_cp.group}
    model = {"model0": wrapped[0].module.sharded_state_dict(metadata=metadata)}
    own = {
        one.untyped_storage().data_ptr()
        for part in optimizer.chained_optimizers
        for main, states in part.optimizer.state.items()
        for one in (main, *states.values())
    }
    for part in optimizer.chained_optimizers:
        ours = pieces(part.sharded_param_state_fully_reshardable(model, False, metadata))
        plain = megatron_distributed.DistributedOptimizer.sharded_param_state_fully_reshardable
        theirs = pieces(plain(part, model, False, metadata))
        assert ours.keys() == theirs.keys() and len(ours) > 10
        for place, piece in ours.items():
            other = theirs[place]
            assert type(piece) is type(other) and piece.key == other.key
            assert piece.replica_id == other.replica_id
            assert torch.equal(piece.data, other.data), piece.key
            assert piece.data.untyped_storage().data_ptr() in own  # and theirs are copies
            assert other.data.untyped_storage().data_ptr() not in own
    shutdown()


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", ["moe", "tied"])
def test_states_are_megatrons_without_its_copies(kind, dtype, request):
    run_world(1, check_states, request.getfixturevalue(f"{kind}_folder"), dtype)


def check_save(folder, out):
    """What goes to the writer is the memory that training changes."""
    parallel, wrapped, optimizer = trained(folder)
    state = sharded_state(wrapped, optimizer, parallel, is_loading=False)
    (out / "partial").mkdir()
    files = ShardedSave(state, out / "partial", parallel).take_files()
    own = {p.untyped_storage().data_ptr() for p in wrapped[0].parameters()}
    for part in optimizer.chained_optimizers:
        for states in part.optimizer.state.values():
            own |= {one.untyped_storage().data_ptr() for one in states.values()}
    large = [chunk for _, chunk in files.chunks if chunk.numel() > 64]
    assert large and all(chunk.untyped_storage().data_ptr() in own for chunk in large)
    shutdown()


def test_a_save_copies_nothing_on_a_cpu(tied_folder, tmp_path):
    run_world(1, check_save, tied_folder, tmp_path)


def check_way(folder, out):
    """A pending checkpoint is completed first where there is no room beside it, and only there."""
    parallel, wrapped, optimizer = trained(folder)
    saver = Saver(out, 1, True, parallel)
    state = sharded_state(wrapped, optimizer, parallel, is_loading=False)
    saver.make_way(1)  # none is pending
    saver.start(state, 1)
    final = out / "checkpoints/round_000001"
    savers.available = lambda: 10**9
    saver.make_way(10**9)
    assert not final.exists()
    saver.make_way(10**9 + 1)
    assert final.exists()
    shutdown()


def test_training_waits_for_a_writer_it_has_no_room_beside(tied_folder, tmp_path):
    run_world(1, check_way, tied_folder, tmp_path)


def check_steps(folder):
    """The same bits whatever part of the parameters a call of AdamW takes."""
    found = []
    for limit in (0, 20_000, 2**40):
        optimizers.STEP_BYTES = limit
        _, wrapped, _ = trained(folder, steps=3)
        found.append([parameter.detach().clone() for parameter in wrapped[0].parameters()])
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))
    start = HfTensors(folder)["model.norm.weight"][:]
    assert not any(torch.equal(start, one) for one in found[0])
    shutdown()


def test_adamw_in_runs_is_adamw(moe_folder):
    run_world(1, check_steps, moe_folder)


def in_file(parameter):
    """Whether a parameter's memory is a mapping of a safetensors file."""
    place = parameter.data_ptr()
    with open("/proc/self/maps") as maps:
        for line in maps:
            first, last = (int(x, 16) for x in line.split(maxsplit=1)[0].split("-"))
            if first <= place < last:
                return line.rstrip().endswith(".safetensors")
    return False


def check_frozen(folder):
    """Norms, embedding, output and down projections stay in their file; others are made of two."""
    parallel = initialise(Layout())
    scorer = EmbeddedScorer(Frozen(hf=folder, offload=True), Packer(parallel, 64), 1.0)
    (chunk,) = scorer.chunks
    made = {name for name, one in chunk.named_parameters() if not in_file(one)}
    assert all("linear_qkv" in name or "linear_fc1" in name for name in made)
    assert len(made) == 2 * 4
    low = EmbeddedScorer(Frozen(hf=folder, dtype="bf16"), Packer(parallel, 64), 1.0)
    assert not any(in_file(one) for chunk in low.chunks for one in chunk.parameters())
    shutdown()


def test_a_frozen_models_weights_stay_in_their_file(dense_folder):
    run_world(1, check_frozen, dense_folder)
