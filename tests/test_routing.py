"""Routing replay in every layout: log-probs and all gradients along given experts, on every rank.

The experts are those of the same model with perturbed weights, so that many differ from its own.
The reference is transformers' model with routers that take the given experts, one sample at a time.
"""

import asyncio
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from worlds import run_world

from iwopd_megatron.batch import gates
from iwopd_megatron.batch.objective import LikelihoodObjective
from iwopd_megatron.batch.packing import Packer
from iwopd_megatron.batch.routing import RoutingReplay
from iwopd_megatron.config.models import Layout
from iwopd_megatron.config.recipe import Train
from iwopd_megatron.errors import GateError, UserError
from iwopd_megatron.hf.config import read_hf_config
from iwopd_megatron.models.actor import Schedule
from iwopd_megatron.models.gpt import build_model
from iwopd_megatron.models.optimizer import build_optimizer, wrap_data_parallel
from iwopd_megatron.parity.hf_reference import hf_model, make_samples, max_error
from iwopd_megatron.rollout.engine import Prompt, Sampling
from iwopd_megatron.rollout.sglang import SglangServer
from iwopd_megatron.runtime.local_world import local_context
from iwopd_megatron.runtime.parallel import initialise, shutdown
from iwopd_megatron.train.journal import Journal
from iwopd_megatron.weights.hf_reader import HfTensors, load_shards
from iwopd_megatron.weights.table import mapped_parameters
from iwopd_megatron.weights.transformers_views import named_gradients

LENGTHS = [24, 17, 32, 20, 28, 19, 24]  # inputs; an odd number, so that a rank has fewer
UNPACKED, PACKED = 32, 120  # token budgets of a micro-batch: one sample, or several
LAYOUTS = {
    1: [({}, "none"), ({}, "full"), ({}, "selective")],
    2: [
        ({}, "none"), ({"tp": 2}, "none"), ({"tp": 2}, "full"), ({"ep": 2}, "selective"),
        ({"cp": 2}, "none"), ({"cp": 2}, "full"), ({"pp": 2}, "none"), ({"pp": 2}, "full"),
        ({"pp": 2}, "selective"), ({"pp": 2, "vpp": 2}, "none"), ({"pp": 2, "vpp": 2}, "full"),
        ({"pp": 2, "num_layers_in_first_pipeline_stage": 1}, "full"),
        ({"pp": 2, "vpp": 2, "pipeline_model_parallel_layout": "E|t*3|t|L"}, "selective"),
    ],
    4: [
        ({"tp": 2, "cp": 2, "ep": 2}, "full"),
        ({"tp": 2, "pp": 2, "vpp": 2, "ep": 2}, "selective"),
    ],
}  # fmt: skip


def routers(model):
    """The routers by the number of their layer, of those that have one."""
    layers = enumerate(model.model.layers)
    return {i: layer.mlp.gate for i, layer in layers if hasattr(layer.mlp, "gate")}


def choices(model, ids):
    """The model's own experts `[inputs, layers, top k]` of ids[:-1]; 0 where a layer has none."""
    chosen = {}
    hooks = [
        router.register_forward_hook(lambda _, __, out, i=i: chosen.update({i: out[2]}))
        for i, router in routers(model).items()
    ]
    with torch.no_grad():
        model(torch.tensor([ids[:-1]]), use_cache=False)
    for hook in hooks:
        hook.remove()
    none = torch.zeros_like(next(iter(chosen.values())))
    layers = range(model.config.num_hidden_layers)
    return torch.stack([chosen.get(i, none) for i in layers], 1).numpy().astype(np.uint8)


def force(model, experts):
    """Make the next forward pass take these experts, weighted as the model's own would be."""
    for layer, router in routers(model).items():
        index = torch.from_numpy(experts[:, layer]).long()

        def forward(hidden, router=router, index=index):
            logits = hidden.reshape(-1, router.hidden_dim) @ router.weight.t()
            is_sigmoid = hasattr(router, "e_score_correction_bias")
            top = (logits.sigmoid() if is_sigmoid else logits.softmax(-1)).gather(1, index)
            if router.norm_topk_prob:
                top = top / top.sum(-1, keepdim=True)
            return logits, top * getattr(router, "routed_scaling_factor", 1), index

        router.forward = forward


def response_logp(model, sample):
    ids = torch.tensor(sample.prompt_ids + sample.response_ids)
    logp = model(ids[None, :-1], use_cache=False).logits[0].log_softmax(-1)
    return logp[len(sample.prompt_ids) - 1 :].gather(1, ids[len(sample.prompt_ids) :, None])[:, 0]


def make_reference(folder):
    """Samples with experts, their log-probs along them, and the gradients of their mean."""
    samples = make_samples(512, LENGTHS)
    other, model = hf_model(folder, torch.float32), hf_model(folder, torch.float32)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in other.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(0.3 * parameter.std() * noise)
    samples = [
        s.with_scores(experts=choices(other, s.prompt_ids + s.response_ids)) for s in samples
    ]
    own = [choices(model, s.prompt_ids + s.response_ids) for s in samples]
    differ = [np.sort(a) != np.sort(s.experts) for a, s in zip(own, samples, strict=True)]
    assert 0.05 < np.concatenate(differ).any(-1).mean() < 0.95
    scores, tokens = [], sum(len(s.response_ids) for s in samples)
    for sample in samples:
        force(model, sample.experts)
        logp = response_logp(model, sample)
        scores.append(logp.detach())
        (-logp.sum() / tokens).backward()
    return samples, scores, named_gradients(model)


@pytest.fixture(scope="module")
def references(moe_folder, moe_no_norm_folder, family_folders):
    folders = moe_folder, moe_no_norm_folder, family_folders["glm4_moe"]
    return [(folder, *make_reference(folder)) for folder in folders]


def errors(schedule, optimizer, chunks, hf, budget, reference):
    """Largest differences of log-probs and, relative to the largest gradient, of gradients."""
    samples, scores, whole = reference
    parallel, packer = schedule.parallel, Packer(schedule.parallel, budget)
    found, _ = schedule.score(samples, packer)
    batches, length = packer(samples)
    schedule.accumulate(optimizer, batches, length, LikelihoodObjective())
    pairs = []
    for chunk in chunks:
        for mapped in (x for x in mapped_parameters(chunk, hf) if x.is_trained):
            axis = parallel.etp if mapped.is_expert else parallel.tp
            sources = [whole[name] for name in mapped.hf_names]
            expected = mapped.sharding.shard(sources, axis.rank, axis.size, hf)
            pairs.append((mapped.parameter.main_grad, expected))
    scale = max(grad.abs().max().item() for grad in whole.values())
    logps = [(torch.tensor(ours), theirs) for ours, theirs in zip(found, scores, strict=True)]
    return max_error(logps), max_error(pairs) / scale


def check_layouts(layouts, references, queue):
    train = Train(distributed_optimizer=False)
    for axes, recompute in layouts:
        parallel = initialise(Layout(**axes))
        for folder, *reference in references:
            hf = read_hf_config(folder)
            chunks = build_model(hf, parallel, recompute=recompute)
            load_shards(chunks, HfTensors(folder), hf, parallel)
            wrapped = wrap_data_parallel(chunks, train)
            optimizer = build_optimizer(wrapped, train)
            arguments = optimizer, chunks, hf
            plain = Schedule(wrapped, parallel)
            without = errors(plain, *arguments, PACKED, reference)
            replaying = Schedule(wrapped, parallel, replay=RoutingReplay(wrapped))
            for budget in (UNPACKED, PACKED):
                found = errors(replaying, *arguments, budget, reference)
                queue.put((axes, recompute, folder.name, budget, found, without))
    shutdown()


@pytest.mark.parametrize("world", LAYOUTS)
def test_layouts_follow_the_given_experts(world, references):
    queue = local_context().SimpleQueue()
    run_world(world, check_layouts, LAYOUTS[world], references, queue, limit=600)
    for _ in range(world * len(LAYOUTS[world]) * len(references) * 2):
        *case, (logp, grads), without = queue.get()
        assert logp < 1e-5, (case, logp)
        assert grads < 1e-5, (case, grads)
        assert without[0] > 0.1, (case, without)
        assert without[1] > 0.01, (case, without)


def check_only_with_experts(folder, samples, queue):
    parallel = initialise(Layout())
    hf = read_hf_config(folder)
    chunks = build_model(hf, parallel)
    load_shards(chunks, HfTensors(folder), hf, parallel)
    packer = Packer(parallel, PACKED)
    before, _ = Schedule(chunks, parallel).score(samples, packer)
    replaying = Schedule(chunks, parallel, replay=RoutingReplay(chunks))
    replaying.score(samples, packer)
    own, _ = replaying.score([s.with_scores(experts=None) for s in samples], packer)
    other = build_model(hf, parallel)
    load_shards(other, HfTensors(folder), hf, parallel)
    teacher, _ = Schedule(other, parallel).score(samples, packer)
    queue.put(before == own == teacher)
    shutdown()


def test_other_models_and_other_samples_keep_their_own_experts(moe_folder, references):
    """A teacher that scores samples with experts, and the student where samples have none."""
    samples = references[0][1]
    queue = local_context().SimpleQueue()
    run_world(1, check_only_with_experts, moe_folder, samples, queue)
    assert queue.get()


def test_samples_without_experts_are_refused():
    sample, hf = (
        make_samples(512, [24])[0],
        SimpleNamespace(num_hidden_layers=4, num_experts_per_tok=2),
    )
    with pytest.raises(GateError, match="sample 0 came with experts of shape None"):
        gates.routes([sample], hf)
    fits = sample.with_scores(experts=np.zeros((24, 4, 2), np.uint8))
    gates.routes([fits], hf)
    short = sample.with_scores(experts=fits.experts[:-1])
    with pytest.raises(GateError, match=r"\(23, 4, 2\), expected \(24, 4, 2\)"):
        gates.routes([fits, short], hf)


@pytest.mark.parametrize("dtype", [np.uint8, np.int16])
def test_the_journal_keeps_experts(tmp_path, dtype):
    experts = np.arange(24 * 4 * 2, dtype=dtype).reshape(24, 4, 2)
    sample, other = make_samples(512, [24, 24])
    journal = Journal(tmp_path)
    journal.add(1, sample.with_scores(experts=experts))
    journal.add(1, other)
    kept = journal.read(1, [Prompt(s.index, s.prompt_ids) for s in (sample, other)])
    assert kept[0] == sample and kept[1] == other
    assert kept[0].experts.dtype == dtype and np.array_equal(kept[0].experts, experts)
    assert kept[1].experts is None


@pytest.mark.parametrize("finish", ["abort", "stop"])
def test_an_answer_cut_off_before_it_began_has_no_experts_yet(finish, monkeypatch):
    """SGLang sends none of a request that still waited; the answer's last part has those of all."""
    meta = {"output_token_logprobs": [], "finish_reason": {"type": finish}, "weight_version": "1"}

    async def post(*_, **__):
        return {"output_ids": [], "meta_info": meta}

    server = SglangServer("http://nowhere", None, SimpleNamespace(vocab_size=16), {1})
    monkeypatch.setattr(server, "_post", post)
    answer = server.generate([3, 4], Sampling(8, with_experts=True))
    if finish == "abort":
        assert asyncio.run(answer).experts is None
    else:
        with pytest.raises(UserError, match="returns no routed experts"):
            asyncio.run(answer)
