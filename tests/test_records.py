"""What a round records by position and of its routers, against plain sums over samples."""

import json
import os
from functools import partial
from pathlib import Path

import pytest
import torch
from worlds import run_world

from iwopd_megatron.batch.metrics import router_means
from iwopd_megatron.batch.packing import Packer
from iwopd_megatron.config.load import load_recipe
from iwopd_megatron.config.models import Layout
from iwopd_megatron.files.run_files import read_records
from iwopd_megatron.hf.config import read_hf_config
from iwopd_megatron.loss.weighting import token_weights
from iwopd_megatron.models.actor import Schedule
from iwopd_megatron.models.gpt import build_model
from iwopd_megatron.models.router_load import RouterLoad
from iwopd_megatron.parity.hf_reference import hf_model, make_samples
from iwopd_megatron.runtime.local_world import local_context
from iwopd_megatron.runtime.parallel import initialise, shutdown
from iwopd_megatron.train.progress import Progress
from iwopd_megatron.train.trainer import Trainer
from iwopd_megatron.weights.hf_reader import HfTensors, load_shards

ROOT = Path(__file__).parent.parent
LENGTHS = [24, 17, 32, 20, 28, 19, 24]


def train_two_rounds(out):
    os.chdir(ROOT)
    recipe = load_recipe(
        Path("recipes/demo_tiny_moe.yaml"),
        [
            f"out={out}",
            "student.parallel={}",
            "train.rounds=2",
            "train.warmup_rounds=1",
            "train.prompts_per_round=8",
            "train.microbatch_tokens=300",
            "evaluate.every=1",
            "evaluate.problems=4",
            "rollout.max_response_tokens=100",
        ],
    )
    parallel = initialise(recipe.student.parallel, recipe.train.seed)
    with Progress(2, visible=False) as progress:
        assert Trainer(recipe, parallel, progress).run()
    shutdown()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Two rounds of eight samples, all of them kept; positions come in bins of two tokens."""
    out = tmp_path_factory.mktemp("run") / "run"
    run_world(1, train_two_rounds, out)
    return out


def rounds(run):
    """(metrics line, kept samples) of both rounds."""
    lines = [line for line in read_records(run / "metrics.jsonl") if line["kind"] == "round"]
    assert [line["round"] for line in lines] == [1, 2]
    return [
        (line, read_records(run / f"samples/round_{line['round']:06d}.jsonl")) for line in lines
    ]


def means(samples, key, places, place_of):
    """(tokens, mean of `key`) of every place, by plain loops."""
    found = [[] for _ in range(places)]
    for sample in samples:
        for t, value in enumerate(sample[key]):
            found[place_of(t, len(sample[key]))].append(value)
    return [(len(x), sum(x) / len(x) if x else None) for x in found]


@pytest.mark.parametrize(("name", "places"), [("deciles", 10), ("positions", 64)])
def test_means_by_position_are_those_of_the_samples(name, places, run):
    for line, samples in rounds(run):
        place_of = {"deciles": lambda t, n: t * 10 // n, "positions": lambda t, n: t // 2}[name]
        for key, ours, sign in (("gap", "reverse_kl", -1), ("weight", "weight", 1)):
            naive = means(samples, key, places, place_of)
            assert line[f"tokens_{name}"] == [count for count, _ in naive]
            for mine, (_, mean) in zip(line[f"{ours}_{name}"], naive, strict=True):
                assert mine == (None if mean is None else pytest.approx(sign * mean, abs=1e-4))
        assert sum(line[f"tokens_{name}"]) == line["loss_tokens"]


def test_every_mean_is_the_deciles_mean(run):
    for line, _ in rounds(run):
        tokens = line["tokens_deciles"]
        for name in ("reverse_kl", "weight", "logp", "abs_gap", "entropy", "clipped", "tis_capped"):
            total = sum(n * (x or 0) for n, x in zip(tokens, line[f"{name}_deciles"], strict=True))
            assert line[name] == pytest.approx(total / line["loss_tokens"], rel=1e-6), name
        assert line["logp"] < 0 < line["entropy"] and line["responses"] == 8


def test_samples_hold_the_weights_of_both_rules(run):
    for _, samples in rounds(run):
        for sample in samples:
            gap = torch.tensor([sample["gap"]])
            for rule in ("iw", "iw_signed"):
                expected = token_weights(gap, torch.ones_like(gap, dtype=torch.bool), rule=rule)
                ours = torch.tensor(sample[f"weight_{rule}"])
                assert torch.allclose(ours, expected[0], atol=1e-5)
            assert sample["weight"] == sample["weight_iw"] != sample["weight_iw_signed"]


def test_router_means_of_an_uneven_layer():
    line = router_means(torch.tensor([[2.0, 2.0, 2.0, 2.0], [6.0, 2.0, 0.0, 0.0]]).double())
    assert line["router_max_over_mean_layers"] == [1, 3]
    assert line["router_cv_layers"] == [0, pytest.approx((6**0.5) / 2)]
    assert line["router_max_over_mean"] == 2


def summed(schedule, hidden, model, batch):
    return schedule.logprobs(hidden, model, batch).logp.sum(), None


def count_experts(layouts, folder, samples, queue):
    for axes, recompute in layouts:
        parallel = initialise(Layout(**axes))
        hf = read_hf_config(folder)
        chunks = build_model(hf, parallel, recompute=recompute)
        load_shards(chunks, HfTensors(folder), hf, parallel)
        load = RouterLoad(chunks, hf.num_hidden_layers, hf.num_experts)
        schedule = Schedule(chunks, parallel, load=load)
        with load.counting():  # gradients too: recomputed layers run their routers twice
            schedule.run(*Packer(parallel, 120)(samples), partial(summed, schedule))
        schedule.score(samples, Packer(parallel, 120))  # not counted
        total = load.tokens.double()
        torch.distributed.all_reduce(total)
        queue.put((axes, recompute, total.tolist()))
    shutdown()


LOADS = {
    1: [({}, "none"), ({}, "full"), ({}, "selective")],
    2: [
        ({"tp": 2}, "none"),
        ({"cp": 2}, "full"),
        ({"pp": 2}, "selective"),
        ({"ep": 2}, "none"),
        ({"pp": 2, "vpp": 2, "pipeline_model_parallel_layout": "E|t*3|t|L"}, "full"),
    ],
    4: [({"tp": 2, "pp": 2, "vpp": 2, "ep": 2}, "full")],
}


@pytest.mark.parametrize("world", LOADS)
def test_expert_tokens_are_those_of_transformers(world, moe_folder):
    samples = make_samples(read_hf_config(moe_folder).vocab_size, LENGTHS, None)
    expected = torch.zeros(4, 8)
    model = hf_model(moe_folder, torch.float32)
    for sample in samples:
        ids = (sample.prompt_ids + sample.response_ids)[:-1]
        with torch.no_grad():
            found = model(torch.tensor([ids]), output_router_logits=True, use_cache=False)
        for layer, logits in enumerate(found.router_logits):
            chosen = logits.topk(2, -1).indices.flatten()
            expected[layer] += chosen.bincount(minlength=8)
    queue = local_context().SimpleQueue()
    run_world(world, count_experts, LOADS[world], moe_folder, samples, queue)
    for _ in range(world * len(LOADS[world])):
        axes, recompute, tokens = queue.get()
        assert tokens == expected.tolist(), (axes, recompute)


def test_a_gate_that_stops_a_run_leaves_an_event(tmp_path):
    out = tmp_path / "run"
    with pytest.raises(Exception, match="drift"):
        run_world(1, drift_too_far, out)
    (event,) = [json.loads(line) for line in (out / "events.jsonl").read_text().splitlines()]
    assert (event["round"], event["event"]) == (1, "gate") and "drift" in event["text"]


def drift_too_far(out):
    os.chdir(ROOT)
    settings = [f"out={out}", "student.parallel={}", "gates.max_drift=1e-12", "train.rounds=6"]
    recipe = load_recipe(Path("recipes/demo_tiny_moe.yaml"), settings)
    parallel = initialise(recipe.student.parallel, recipe.train.seed)
    with Progress(1, visible=False) as progress:
        Trainer(recipe, parallel, progress).run()
