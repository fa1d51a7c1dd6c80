"""The embedded engine on the trainer's own parameters, and its products of packed weights."""

import os

import pytest
import torch
from worlds import run_world

from iwopd_megatron.config.models import Layout
from iwopd_megatron.hf.config import read_hf_config
from iwopd_megatron.hf.families import FAMILIES
from iwopd_megatron.models.gpt import build_model
from iwopd_megatron.rollout import packed
from iwopd_megatron.rollout.embedded import HfEngine
from iwopd_megatron.rollout.engine import Prompt, Sampling
from iwopd_megatron.rollout.threads import Threads
from iwopd_megatron.runtime.local_world import local_context
from iwopd_megatron.runtime.parallel import initialise, shutdown
from iwopd_megatron.weights.hf_reader import HfTensors, load_shards
from iwopd_megatron.weights.sync import WeightStream

FOLDERS = ["moe", "dense", "tied"]
KINDS = [*FOLDERS, *FAMILIES]
NO_EOS, TOKENS = 512, 24  # an id no model draws
SAMPLING = Sampling(TOKENS, 0.8, seed=1, stream=2)


def prompts():
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(0, 512, (n,), generator=generator).tolist() for n in (3, 11, 7, 5, 1)]
    return [Prompt(i, one) for i, one in enumerate(ids)]


def student(folder, layout):
    parallel, hf = initialise(layout), read_hf_config(folder)
    chunks = build_model(hf, parallel)
    load_shards(chunks, HfTensors(folder), hf, parallel)
    return chunks, WeightStream(chunks, hf, parallel)


def engine(folder, weights, version=0):
    made = HfEngine(folder, torch.float32, {NO_EOS}, 8)
    made.update(weights, version)
    return made


def answers(made):
    found = made.generate(prompts(), SAMPLING)
    return [(sample.response_ids, sample.rollout_logp, sample.weight_version) for sample in found]


def assert_same(ours, theirs):
    for (ids, logp, version), (other_ids, other_logp, other) in zip(ours, theirs, strict=True):
        assert ids == other_ids and version == other
        assert logp == pytest.approx(other_logp, abs=1e-5)


def compare(folder, layout, queue):
    """Answers on the parameters and on a copy of them, before and after a change of all."""
    chunks, stream = student(folder, layout)
    shared = engine(folder, stream, 3)
    own = {p.data_ptr() for chunk in chunks for p in chunk.parameters()}
    read = shared.model.read
    pieces = [read.embedding, read.norm, read.head, *(x for x in read.layers[0] if x is not None)]
    flat = [x for piece in pieces for x in (piece if isinstance(piece, tuple) else [piece])]
    is_shared = all(x.data_ptr() in own for x in flat)
    found = [(answers(shared), answers(engine(folder, list(stream), 3)))]
    with torch.no_grad():
        generator = torch.Generator().manual_seed(7)
        for p in chunks[0].parameters():
            p.add_(torch.randn(p.shape, generator=generator), alpha=0.02)
    shared.update(stream, 4)
    found.append((answers(shared), answers(engine(folder, list(stream), 4))))
    if os.environ["RANK"] == "0":
        queue.put((is_shared, found))
    shutdown()


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_the_engine_reads_whole_parameters_where_they_lie(kind, world, request, family_folders):
    """Not a byte is copied, and its answers are those of a copy, also once the weights changed."""
    folder = family_folders.get(kind) or request.getfixturevalue(f"{kind}_folder")
    queue = local_context().SimpleQueue()
    run_world(world, compare, folder, Layout(), queue)
    is_shared, (before, after) = queue.get()
    assert is_shared
    assert_same(*before)
    assert_same(*after)
    assert [ids for ids, _, _ in before[0]] != [ids for ids, _, _ in after[0]]


def cut(folder, layout, queue):
    _, stream = student(folder, layout)
    made = engine(folder, stream)
    found = answers(made)
    is_cut = stream.in_place is None
    has_names = is_cut and set(made.model.weights) == set(HfTensors(folder))
    if os.environ["RANK"] == "0":
        queue.put((is_cut, has_names, found))
    shutdown()


@pytest.mark.parametrize("layout", [Layout(tp=2), Layout(pp=2), Layout(ep=2)])
def test_shards_are_gathered_into_weights_of_its_own(layout, moe_folder):
    queue = local_context().SimpleQueue()
    run_world(2, cut, moe_folder, layout, queue)
    is_cut, has_names, found = queue.get()
    assert is_cut and has_names
    run_world(1, cut, moe_folder, Layout(), queue)
    is_cut, _, expected = queue.get()
    assert not is_cut
    assert_same(found, expected)


def both_products(folder, queue):
    """Answers with plain products and with packed ones, of copies and of the trainer's weights."""
    _, stream = student(folder, Layout())
    made = [engine(folder, list(stream)), engine(folder, stream)]
    plain = [answers(one) for one in made]
    packed.LEAST_BYTES = 0
    assert all(one.model.packed(5, TOKENS, Threads(1)) is not None for one in made)
    queue.put((plain, [answers(one) for one in made]))
    shutdown()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="torch without MKL")
def test_packed_weights_write_the_same_answers(kind, request, family_folders):
    folder = family_folders.get(kind) or request.getfixturevalue(f"{kind}_folder")
    queue = local_context().SimpleQueue()
    run_world(1, both_products, folder, queue)
    plain, fast = queue.get()
    for a, b in zip(plain, fast, strict=True):
        assert_same(a, b)


def test_weights_are_packed_where_it_pays(dense_folder, monkeypatch):
    tensors = HfTensors(dense_folder)

    def made(dtype):
        one = HfEngine(dense_folder, dtype, {NO_EOS}, 8)
        one.update([(name, tensor[:].to(dtype)) for name, tensor in tensors.items()], 0)
        return one.model

    model, one = made(torch.float32), Threads(1)
    assert model.packed(4, 100, one) is None  # small
    monkeypatch.setattr(packed, "LEAST_BYTES", 0)
    assert model.packed(packed.MOST_ROWS, packed.LEAST_STEPS, one) is not None
    assert model.packed(packed.MOST_ROWS + 1, 100, one) is None
    assert model.packed(4, packed.LEAST_STEPS - 1, one) is None
    assert made(torch.bfloat16).packed(4, 100, one) is None


def test_an_engine_without_weights_says_so(dense_folder):
    with pytest.raises(RuntimeError, match="no weights yet"):
        HfEngine(dense_folder, torch.float32, {NO_EOS}, 8).model.packed(1, 9, Threads(1))
