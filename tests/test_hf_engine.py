"""The embedded engine against transformers' plain forward pass, over batch sizes and worlds.

Prompts are ragged, so that a batch has left padding. Every answer must be what one sequence alone
gives, with the log-probs a forward pass over the whole sequence assigns to it.
"""

import os
import pickle
import pickletools

import pytest
import torch
from worlds import run_world

from iwopd_megatron.config.models import Layout
from iwopd_megatron.hf.families import FAMILIES
from iwopd_megatron.parity.hf_reference import hf_model
from iwopd_megatron.rollout.decoding import causal_mask
from iwopd_megatron.rollout.drawing import draw, uniform_numbers
from iwopd_megatron.rollout.embedded import HfEngine
from iwopd_megatron.rollout.engine import Prompt, Sampling
from iwopd_megatron.rollout.tensor_pickle import pickle_tensors
from iwopd_megatron.runtime.local_world import local_context
from iwopd_megatron.runtime.parallel import initialise, shutdown
from iwopd_megatron.weights.hf_reader import HfTensors

LENGTHS, MAX_TOKENS, VOCAB = [3, 17, 9, 25, 1, 6, 12], 20, 512
TEMPERATURES = (0.0, 0.7, 1.0)
WORLDS = {1: (1, 3, 8), 2: (2, 8)}  # processes: batch sizes
NO_EOS = VOCAB  # an id no model draws


def prompts():
    generator = torch.Generator().manual_seed(0)
    return [
        Prompt(10 + i, torch.randint(0, VOCAB, (n,), generator=generator).tolist())
        for i, n in enumerate(LENGTHS)
    ]


def weights(folder):
    return [(name, tensor[:]) for name, tensor in HfTensors(folder).items()]


def build_engine(folder, eos_ids, batch_size):
    engine = HfEngine(folder, torch.float32, eos_ids, batch_size)
    engine.update(weights(folder), 5)
    return engine


def generate(folder, runs, queue):
    """runs: (EOS ids, batch size, Sampling) each; rank 0 puts the list of answers."""
    initialise(Layout())
    answers = [
        build_engine(folder, eos_ids, batch_size).generate(prompts(), sampling)
        for eos_ids, batch_size, sampling in runs
    ]
    if os.environ["RANK"] == "0":
        queue.put(answers)
    shutdown()


def generate_in_world(world, folder, runs):
    queue = local_context().SimpleQueue()
    run_world(world, generate, folder, runs, queue)
    return queue.get()


@pytest.fixture(scope="module")
def answers(moe_folder):
    """[temperature, world, batch size] -> the answers."""
    found = {}
    for world, batch_sizes in WORLDS.items():
        cases = [(t, size) for t in TEMPERATURES for size in batch_sizes]
        runs = [({NO_EOS}, size, Sampling(MAX_TOKENS, t, seed=1, stream=2)) for t, size in cases]
        for (t, size), result in zip(
            cases, generate_in_world(world, moe_folder, runs), strict=True
        ):
            found[t, world, size] = result
    return found


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_answers_depend_on_neither_batch_nor_ranks(temperature, answers):
    alone = answers[temperature, 1, 1]
    assert [(s.index, s.prompt_ids) for s in alone] == [(p.index, p.ids) for p in prompts()]
    for world, batch_sizes in WORLDS.items():
        for size in batch_sizes:
            got = answers[temperature, world, size]
            for sample, expected in zip(got, alone, strict=True):
                assert sample.index == expected.index
                assert sample.response_ids == expected.response_ids
                assert sample.truncated and sample.weight_version == 5
                assert len(sample.response_ids) == MAX_TOKENS


def plain_logprobs(model, sample, temperature):
    """`[response, V]` log-probs from one forward pass over the whole sequence."""
    ids = torch.tensor([sample.prompt_ids + sample.response_ids])
    with torch.no_grad():
        logits = model(ids[:, :-1], use_cache=False).logits[0, len(sample.prompt_ids) - 1 :]
    return (logits / temperature).log_softmax(-1)


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_logprobs_are_those_of_a_plain_forward_pass(temperature, answers, moe_folder):
    model = hf_model(moe_folder, torch.float32)
    for sample in answers[temperature, 1, 8] + answers[temperature, 2, 2]:
        logp = plain_logprobs(model, sample, temperature or 1.0)
        response = torch.tensor(sample.response_ids)
        expected = logp.gather(-1, response[:, None])[:, 0]
        assert (torch.tensor(sample.rollout_logp) - expected).abs().max() < 1e-5
        if temperature == 0:
            assert torch.equal(logp.argmax(-1), response)
        else:  # the drawn token is where the cumulative distribution passes the uniform number
            sampling = Sampling(MAX_TOKENS, temperature, seed=1, stream=2)
            uniform = torch.from_numpy(uniform_numbers(sampling, sample.index))
            above = logp.double().exp().cumsum(-1).gather(-1, response[:, None])[:, 0]
            assert (above > uniform - 1e-5).all()
            assert (above - expected.double().exp() < uniform + 1e-5).all()


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_eos_ends_an_answer_and_belongs_to_it(world, temperature, answers, moe_folder):
    """The answers without an end token, each cut after its first one."""
    endless = answers[temperature, 1, 1]
    eos_ids = {endless[1].response_ids[4], endless[2].response_ids[11]}
    sampling = Sampling(MAX_TOKENS, temperature, seed=1, stream=2)
    (got,) = generate_in_world(world, moe_folder, [(eos_ids, 4, sampling)])
    for sample, whole in zip(got, endless, strict=True):
        places = [i for i, token in enumerate(whole.response_ids) if token in eos_ids]
        length = places[0] + 1 if places else MAX_TOKENS
        assert sample.response_ids == whole.response_ids[:length]
        assert sample.rollout_logp == pytest.approx(whole.rollout_logp[:length], abs=1e-5)
        assert sample.truncated == (not places)
    assert {sample.truncated for sample in got} == {True, False}


def test_seed_stream_and_prompt_each_change_the_draw():
    base = Sampling(50, seed=1, stream=2)
    draws = [
        uniform_numbers(base, 0),
        uniform_numbers(base, 1),
        uniform_numbers(Sampling(50, seed=2, stream=2), 0),
    ]
    draws.append(uniform_numbers(Sampling(50, seed=1, stream=3), 0))
    assert (uniform_numbers(base, 0) == draws[0]).all()
    for i, one in enumerate(draws):
        assert not any((one == other).any() for other in draws[:i])
    assert (uniform_numbers(Sampling(20, seed=1, stream=2), 0) == draws[0][:20]).all()


@pytest.mark.parametrize(("temperature", "top_p"), [(0.7, 1.0), (1.0, 1.0), (1.0, 0.8)])
def test_sampled_frequencies_follow_the_softmax(temperature, top_p):
    """With top_p the likeliest that reach it, 0.61 and 0.22 of the mass here, in proportion."""
    count = 100_000
    logits = torch.tensor([-float("inf"), 1.0, -2.0, 0.3, 2.0, -0.5, -float("inf")])
    uniform = torch.from_numpy(uniform_numbers(Sampling(count, seed=3), 0))
    token, logp = draw(logits.expand(count, -1), uniform, Sampling(1, temperature, top_p))
    prob = (logits / temperature).softmax(-1)
    assert torch.allclose(logp.exp(), prob[token], atol=1e-6)  # of the whole distribution
    if top_p < 1:
        prob = prob.where(torch.tensor([0, 1, 0, 0, 1, 0, 0]).bool(), 0) / prob[[1, 4]].sum()
    seen = torch.bincount(token, minlength=len(logits)).double()
    deviation = (count * prob * (1 - prob)).sqrt()
    assert ((seen - count * prob).abs() <= 4 * deviation).all(), seen / count - prob


@pytest.mark.parametrize("kind", ["moe_no_norm", "dense", "tied", *FAMILIES])
@pytest.mark.parametrize("batch_size", [1, 8])
def test_other_models(kind, batch_size, request, family_folders):
    """Greedy answers and log-probs of a plain forward pass; ragged prompts, and equal ones."""
    folder = family_folders.get(kind) or request.getfixturevalue(f"{kind}_folder")
    runs = [({NO_EOS}, batch_size, Sampling(MAX_TOKENS, 0.0))]
    (answers,) = generate_in_world(1, folder, runs)
    model = hf_model(folder, torch.float32)
    for sample in answers:
        logp = plain_logprobs(model, sample, 1.0)
        response = torch.tensor(sample.response_ids)
        assert torch.equal(logp.argmax(-1), response)
        expected = logp.gather(-1, response[:, None])[:, 0]
        assert (torch.tensor(sample.rollout_logp) - expected).abs().max() < 1e-5


def test_causal_mask():
    """Left padding is seen by itself only: a row that sees nothing would be NaN in some kernels."""
    mask = causal_mask(torch.tensor([[False, False, True, True]]))
    assert mask.shape == (1, 1, 4, 4)
    assert mask[0, 0].int().tolist() == [[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 1]]


def test_weights_are_named_as_on_disk(moe_folder, dense_folder, tied_folder, family_folders):
    for folder in (moe_folder, dense_folder, tied_folder, *family_folders.values()):
        engine, disk = HfEngine(folder, torch.float32, {NO_EOS}, 8), dict(weights(folder))
        shapes = {name: tensor.shape for name, tensor in engine.model.weights.items()}
        assert shapes == {name: tensor.shape for name, tensor in disk.items()}
        engine.update(disk.items(), 0)
        assert all(torch.equal(engine.model.weights[name], disk[name]) for name in disk)


def test_an_update_that_lacks_a_tensor_is_an_error(moe_folder):
    engine = HfEngine(moe_folder, torch.float32, {NO_EOS}, 8)
    name = "model.layers.2.self_attn.q_norm.weight"
    pairs = [(key, tensor) for key, tensor in weights(moe_folder) if key != name]
    with pytest.raises(RuntimeError, match=f"weight version 3 lacks 1 tensors, e.g. {name}"):
        engine.update(pairs, 3)
    assert engine.version == -1


def begin_and_finish(folder, queue):
    """Greedy answers; then the same, of which 0, 1, 2 ... tokens are given."""
    initialise(Layout())
    engine, sampling = build_engine(folder, {NO_EOS}, 8), Sampling(MAX_TOKENS, 0.0)
    whole = engine.generate(prompts(), sampling)
    begun = [Prompt(i, x.prompt_ids + x.response_ids[:i], given=i) for i, x in enumerate(whole)]
    rest = engine.generate(begun, sampling)
    expected = [sample.response_ids[i:] for i, sample in enumerate(whole)]
    queue.put((expected, [sample.response_ids for sample in rest]))
    shutdown()


def test_given_tokens_count_as_the_answers_own(moe_folder):
    queue = local_context().SimpleQueue()
    run_world(1, begin_and_finish, moe_folder, queue)
    expected, found = queue.get()
    assert found == expected


@pytest.mark.parametrize("kind", ["linear", "llama3", "yarn"])
def test_scaled_rotary_positions(rotary_folders, kind):
    """Log-probs of the drawn tokens are transformers' own, at contexts beyond the original one."""
    folder = rotary_folders[kind]
    (answers,) = generate_in_world(1, folder, [({NO_EOS}, 4, Sampling(MAX_TOKENS, 1.0))])
    model = hf_model(folder, torch.float32)
    for sample in answers:
        logp = plain_logprobs(model, sample, 1.0)
        expected = logp.gather(-1, torch.tensor(sample.response_ids)[:, None])[:, 0]
        assert (torch.tensor(sample.rollout_logp) - expected).abs().max() < 1e-5


def test_tensors_for_a_server_are_pickled_under_torchs_names_alone():
    """Whatever Megatron has put in the place of torch's function."""
    parts = [("a", torch.arange(6.0).reshape(2, 3)), ("b", torch.ones(2, dtype=torch.bfloat16))]
    pickled = pickle_tensors(parts)
    names = {text for code, text, _ in pickletools.genops(pickled) if isinstance(text, str)}
    assert "_load_from_bytes" in names and not any("megatron" in name for name in names)
    for (name, tensor), (again, back) in zip(parts, pickle.loads(pickled), strict=True):
        assert name == again and tensor.dtype == back.dtype and torch.equal(tensor, back)


def test_a_view_is_pickled_without_the_buffer_it_lies_in():
    """Megatron's parameters are views of one buffer: whole for each, a push would be quadratic."""
    buffer = torch.arange(1e5)
    parts = [("a", buffer[:6].view(2, 3)), ("b", buffer[100:160:2]), ("c", buffer[:4].view(2, 2).T)]
    pickled = pickle_tensors(parts)
    assert len(pickled) < 5000
    for (_, tensor), (_, back) in zip(parts, pickle.loads(pickled), strict=True):
        assert torch.equal(tensor, back)
