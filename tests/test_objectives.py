"""Every objective in every layout and packing: gradients of all parameters, on every rank.

The reference is transformers' model, one sample at a time, and the formulas written token by token
in this file. Packed and one-sample-a-micro-batch gradients must agree closer still.
"""

import numpy as np
import pytest
import torch
from worlds import run_world

from iwopd_megatron.batch.minibatch import Minibatch
from iwopd_megatron.batch.objective import DistillationObjective, LikelihoodObjective
from iwopd_megatron.batch.packing import Packer, Support
from iwopd_megatron.config.loss import Loss
from iwopd_megatron.config.models import Layout
from iwopd_megatron.config.recipe import Train
from iwopd_megatron.hf.config import read_hf_config
from iwopd_megatron.loss import linear_loss
from iwopd_megatron.loss.topk import MIN_TAIL
from iwopd_megatron.models.actor import Schedule
from iwopd_megatron.models.gpt import build_model
from iwopd_megatron.models.optimizer import build_optimizer, wrap_data_parallel
from iwopd_megatron.parity.hf_reference import hf_model, make_samples, max_error
from iwopd_megatron.runtime.local_world import local_context
from iwopd_megatron.runtime.parallel import initialise, shutdown
from iwopd_megatron.weights.hf_reader import HfTensors, load_shards
from iwopd_megatron.weights.table import mapped_parameters
from iwopd_megatron.weights.transformers_views import named_gradients

LENGTHS = [24, 17, 32, 20, 28, 19, 24, 32]  # inputs; any two are more than the longest
UNPACKED, PACKED = 32, 120  # token budgets of a micro-batch: one sample, or several
K = 5
DENSE = dict(objective="topk_kl", topk={"k": K})
# name: (loss, whether old log-probs are given, whether tokens are masked)
OBJECTIVES = {
    "IW-OPD, one step a round": (Loss(), False, False),
    "masked tokens, mean over tokens": (Loss(aggregation="token_mean"), False, True),
    "IW-ExOPD, several steps, clips bind": (
        Loss(extrapolation=1.5, dual_clip=1.1, tis_cap=1.5, aggregation="seq_mean_token_sum"),
        True, True,
    ),
    "no importance weight": (Loss(tis_cap=None, weighting={"rule": "uniform"}), True, False),
    "top-K, renormalised": (Loss(**DENSE), False, True),
    "top-K with a tail": (Loss(**DENSE | {"topk": {"k": K, "support": "tail"}}), True, False),
}  # fmt: skip
LAYOUTS = {
    1: [{}],
    2: [{}, {"tp": 2, "ep": 2}, {"cp": 2}, {"pp": 2}, {"pp": 2, "vpp": 2}],
    4: [{"tp": 2, "cp": 2, "ep": 2}, {"tp": 2}],
}


def naive_loss(loss, sample, logits, responses, tokens, support):
    """One response's share of the loss from its `[T, V]` logits, token by token: Eq. 6, 17, 67."""
    T = len(sample.response_ids)
    logp = logits.log_softmax(-1)
    own = logp[torch.arange(T), torch.tensor(sample.response_ids)]
    old = np.array(sample.old_logp or own.tolist())
    teacher, base, rollout = (
        np.array(x) for x in (sample.teacher_logp, sample.base_logp, sample.rollout_logp)
    )
    read = [t for t in range(T) if sample.loss_mask is None or sample.loss_mask[t]]
    divide = {
        "token_mean": tokens,
        "seq_mean_token_mean": len(read) * responses,
        "seq_mean_token_sum": responses,
    }[loss.aggregation]
    d = np.abs(teacher - old)
    total, value = sum(d[t] for t in read[:-1]), 0.0
    for i, t in enumerate(read):
        share = sum(d[k] for k in read[:i]) / total if total else 0.0
        weight = 1.0 if loss.weighting.rule == "uniform" else 1 + 0.5 * (1 - share)
        if loss.objective == "topk_kl":
            ids, reference = support[sample.index][0][t], support[sample.index][1][t]
            p, q = logp[t, ids].exp(), reference.exp()
            if loss.topk.support == "tail":
                rest = [(1 - x.sum()).clamp(min=MIN_TAIL)[None] for x in (p, q)]
                p, q = torch.cat([p, rest[0]]), torch.cat([q, rest[1]])
            p, q = p / p.sum(), q / q.sum()
            value = value + weight * (p * (p / q).log()).sum() / divide
            continue
        a = loss.extrapolation * (teacher[t] - base[t]) - (old[t] - base[t])
        a *= weight
        ratio = (own[t] - old[t]).exp()
        term = torch.minimum(ratio * a, ratio.clamp(0.8, 1.2) * a)
        if loss.dual_clip and a < 0:
            term = term.clamp(min=loss.dual_clip * a)
        correction = min(np.exp(old[t] - rollout[t]), loss.tis_cap) if loss.tis_cap else 1.0
        value = value - correction * term / divide
    return value


def with_scores(model, has_old, is_masked):
    """Samples whose engine and old log-probs lie around the model's own, some tokens masked."""
    generator = torch.Generator().manual_seed(3)
    samples = []
    for sample in make_samples(512, LENGTHS):
        ids = torch.tensor([sample.prompt_ids + sample.response_ids])
        logp = model(ids[:, :-1]).logits[0].log_softmax(-1)[len(sample.prompt_ids) - 1 :]
        own = logp[torch.arange(len(logp)), ids[0, len(sample.prompt_ids) :]].detach()
        near, far, base = 0.3 * torch.randn(3, len(own), generator=generator)
        mask = (torch.rand(len(own), generator=generator) < 0.7).tolist()
        sample = sample.with_scores(
            rollout_logp=(own + 2 * far).tolist(),
            base_logp=(own + base).tolist(),
            old_logp=(own + near).tolist() if has_old else [],
            loss_mask=mask if is_masked else None,
        )
        samples.append(sample)
    if is_masked:
        none = [False] * len(samples[2].response_ids)
        samples[2] = samples[2].with_scores(loss_mask=none)
    return samples


def random_support(samples):
    """Per sample: K different ids a token, and a teacher's log-probs of them."""
    generator = torch.Generator().manual_seed(4)
    support = []
    for sample in samples:
        noise = torch.randn(len(sample.response_ids), 512, generator=generator)
        logp, ids = (3 * noise).log_softmax(-1).topk(K)
        support.append((ids, logp))
    return support


@pytest.fixture(scope="module")
def references(moe_folder):
    """name -> (samples, support, gradients by Hugging Face name)."""
    found = {}
    for name, (loss, has_old, is_masked) in OBJECTIVES.items():
        model = hf_model(moe_folder, torch.float32)
        samples = with_scores(model, has_old, is_masked)
        support = random_support(samples)
        read = [sample for sample in samples if sample.loss_tokens]
        tokens = sum(sample.loss_tokens for sample in read)
        for sample in read:
            ids = torch.tensor([sample.prompt_ids + sample.response_ids])
            logits = model(ids[:, :-1]).logits[0, len(sample.prompt_ids) - 1 :]
            naive_loss(loss, sample, logits, len(read), tokens, support).backward()
        found[name] = samples, support, named_gradients(model)
    return found


def gradients(schedule, optimizer, samples, support, loss, budget):
    """This rank's shards of all gradients, in the order of its parameters."""
    packer, parallel = Packer(schedule.parallel, budget), schedule.parallel
    own = ()
    if loss.objective == "topk_kl" and parallel.is_last_stage:
        own = [
            Support(
                *(
                    torch.stack([support[s][part][t] for s, t in zip(*where, strict=True)])
                    if len(batch.rows)
                    else torch.zeros(0, K, dtype=support[0][part].dtype)
                    for part in (0, 1)
                )
            )
            for batch in packer(samples)[0]
            for where in [(batch.owner.tolist(), batch.offset.tolist())]
        ]
    objective = DistillationObjective(loss, parallel.cp.group)
    batches, length = Minibatch(samples, objective, own).pack(packer, loss.aggregation)
    if budget == UNPACKED:
        assert all(len(set(batch.owner.tolist())) <= 1 for batch in batches)
    schedule.accumulate(optimizer, batches, length, objective)
    return [p.main_grad.clone() for chunk in schedule.chunks for p in chunk.parameters()]


def check_layouts(folder, layouts, references, queue):
    linear_loss.CPU_CHUNK = 16  # several chunks a micro-batch where the loss is formed in one pass
    hf, train = read_hf_config(folder), Train(distributed_optimizer=False)
    for axes in layouts:
        parallel = initialise(Layout(**axes))
        chunks = build_model(hf, parallel)
        load_shards(chunks, HfTensors(folder), hf, parallel)
        wrapped = wrap_data_parallel(chunks, train)
        schedule, optimizer = Schedule(wrapped, parallel), build_optimizer(wrapped, train)
        for name, (loss, *_) in OBJECTIVES.items():
            samples, support, whole = references[name]
            unpacked, packed = (
                gradients(schedule, optimizer, samples, support, loss, budget)
                for budget in (UNPACKED, PACKED)
            )
            expected = []
            for chunk in chunks:
                for mapped in mapped_parameters(chunk, hf):
                    axis = parallel.etp if mapped.is_expert else parallel.tp
                    sources = [whole[x] for x in mapped.hf_names]
                    expected.append(mapped.sharding.shard(sources, axis.rank, axis.size, hf))
            relative = max(
                ((a - b).abs().max() / b.abs().max().clamp(min=1e-30)).item()
                for a, b in zip(packed, unpacked, strict=True)
            )
            scale = max(x.abs().max().item() for x in whole.values())
            error = max_error(list(zip(packed, expected, strict=True))) / scale
            queue.put((name, axes, error, relative))
    shutdown()


@pytest.mark.parametrize("world", LAYOUTS)
def test_gradients(world, moe_folder, references):
    queue = local_context().SimpleQueue()
    run_world(world, check_layouts, moe_folder, LAYOUTS[world], references, queue)
    for _ in range(world * len(LAYOUTS[world]) * len(OBJECTIVES)):
        name, axes, error, relative = queue.get()
        assert error < 1e-5, (name, axes, error)
        assert relative < 1e-5, (name, axes, relative)


def check_support(folder, layouts, samples, expected, queue):
    for axes in layouts:
        parallel = initialise(Layout(**axes))
        hf = read_hf_config(folder)
        chunks = build_model(hf, parallel)
        load_shards(chunks, HfTensors(folder), hf, parallel)
        packer = Packer(parallel, PACKED)
        scores, support = Schedule(chunks, parallel, 0.7).score(samples, packer, topk=K)
        for sample, logp, reference in zip(samples, scores, expected, strict=True):
            own = reference[torch.arange(len(logp)), torch.tensor(sample.response_ids)]
            own = own if sample.loss_mask is None else torch.zeros_like(own)
            assert torch.allclose(torch.tensor(logp), own, atol=2e-5), axes
        batches = packer(samples)[0] if parallel.is_last_stage else []
        for batch, (ids, values) in zip(batches, support, strict=True):
            top = [
                expected[owner][t].topk(K)
                for owner, t in zip(batch.owner.tolist(), batch.offset.tolist(), strict=True)
            ]
            assert torch.equal(ids, torch.stack([x.indices for x in top])), axes
            assert torch.allclose(values, torch.stack([x.values for x in top]), atol=2e-5), axes
        queue.put(sum(len(batch.rows) for batch in batches))
    shutdown()


@pytest.mark.parametrize("world", [1, 2])
def test_the_teachers_likeliest_tokens(world, moe_folder):
    """As transformers ranks them, next to the rows of the packing in which they are read."""
    samples = make_samples(512, LENGTHS)
    samples[1] = samples[1].with_scores(loss_mask=[False] * len(samples[1].response_ids))
    model, expected = hf_model(moe_folder, torch.float32), []
    for sample in samples:
        ids = torch.tensor([sample.prompt_ids + sample.response_ids])
        with torch.no_grad():
            logits = model(ids[:, :-1]).logits[0, len(sample.prompt_ids) - 1 :] / 0.7
        expected.append(logits.log_softmax(-1))
    queue = local_context().SimpleQueue()
    run_world(world, check_support, moe_folder, LAYOUTS[world], samples, expected, queue)
    tokens = sum(sample.loss_tokens for sample in samples)
    seen = sum(queue.get() for _ in range(world * len(LAYOUTS[world])))
    # Ranks of dp2 and cp2 hold a part each, both of tp2 all, of pp2 the last stage does.
    assert seen == (tokens if world == 1 else 6 * tokens)


def old_is_own(folder, queue):
    parallel = initialise(Layout())
    hf, train = read_hf_config(folder), Train(distributed_optimizer=False)
    chunks = build_model(hf, parallel)
    load_shards(chunks, HfTensors(folder), hf, parallel)
    wrapped = wrap_data_parallel(chunks, train)
    schedule, optimizer = Schedule(wrapped, parallel), build_optimizer(wrapped, train)
    samples = make_samples(512, LENGTHS)
    own, _ = schedule.score(samples, Packer(parallel, PACKED))
    given = [s.with_scores(old_logp=logp) for s, logp in zip(samples, own, strict=True)]
    loss = Loss(clip=1e-9, weighting={"rule": "iw_signed"})  # any ratio but 1 would be clipped
    a, b = (gradients(schedule, optimizer, s, None, loss, PACKED) for s in (samples, given))
    error = max(((x - y).abs().max() / y.abs().max()).item() for x, y in zip(a, b, strict=True))
    queue.put(error)
    shutdown()


def test_the_first_steps_old_log_probs_are_its_own(moe_folder):
    """Computed up front or by the same forward pass: the ratio is 1, the gradients are the same."""
    queue = local_context().SimpleQueue()
    run_world(1, old_is_own, moe_folder, queue)
    assert queue.get() < 1e-5


def test_given_responses_weigh_every_token_the_same():
    objective, gap = LikelihoodObjective(), torch.tensor([1.0, -2.0, 3.0])
    weights = objective.weighting.packed(gap, torch.zeros(3).long(), torch.ones(3).bool())
    assert weights.tolist() == [1.0, 1.0, 1.0]
