"""Routing replay with a real SGLang server: its experts, whole and exact, and what replay changes.

The student has 32 experts a layer, so that rounding in bf16 changes many choices.
"""

import asyncio
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import httpx
import numpy as np
import pytest
import torch
from conftest import write_folder
from worlds import run_world

from iwopd_megatron.actor import Schedule
from iwopd_megatron.config_models import Layout
from iwopd_megatron.hf_io import HfTensors, load_shards
from iwopd_megatron.model import build_model, wrap_precision
from iwopd_megatron.packing import Packer
from iwopd_megatron.parallel import initialise, local_context, shutdown
from iwopd_megatron.preflight import read_hf_config
from iwopd_megatron.recipe import load_recipe
from iwopd_megatron.rollout import Prompt, Sampling
from iwopd_megatron.rollout.make import make_server
from iwopd_megatron.rollout.pool import Place, Pool
from iwopd_megatron.rollout.sglang import SglangServer
from iwopd_megatron.routing import RoutingReplay
from iwopd_megatron.runlog import read_metrics

from megatron.core.transformer.moe.router import TopKRouter  # isort: skip

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "recipes/demo_sglang.yaml"
EOS, TOKENS = 1, 100


@pytest.fixture(scope="module", autouse=True)
def in_the_repository():
    """Recipes name their files relative to the repository."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        yield


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    """A folder whose weights bf16 holds exactly: engine and trainer differ only in arithmetic."""
    folder = tmp_path_factory.mktemp("hf") / "student"
    experts = dict(num_experts=32, num_experts_per_tok=4, moe_intermediate_size=32)
    write_folder(
        folder, "Qwen3Moe", **experts, norm_topk_prob=True, eos_token_id=EOS, round_to_bf16=True
    )
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(ROOT / "recipes/demo/student" / name, folder)
    return folder


def overrides(student, dtype, out):
    return [
        f"student.hf={student}", f"teacher.hf={student}", f"student.dtype={dtype}", f"out={out}",
        f"rollout.max_response_tokens={TOKENS}", "rollout.routing_replay=true",
    ]  # fmt: skip


@pytest.fixture(scope="module", params=["fp32", "bf16"])
def served(request, student, tmp_path_factory):
    """(dtype, URL) of a server that the recipe starts."""
    out = tmp_path_factory.mktemp("served")
    server = make_server(load_recipe(RECIPE, overrides(student, request.param, out)), 0)
    server.start()
    try:
        server.wait_ready(300)
        yield request.param, server.url
    finally:
        server.stop()


def generate(url, student, count=32, interrupt=False):
    """Answers to random prompts through the pool; interrupt: the server lets go of all of them."""

    async def collect():
        async with httpx.AsyncClient(trust_env=False) as http:
            server = SglangServer(url, http, read_hf_config(student), {EOS}, routed_experts=True)
            await server.wait_ready()
            await http.post(f"{url}/update_weight_version", json={"new_version": "0"})
            pool = Pool([Place(server, version=0)], count, {EOS}, print)
            pool.version = 0
            ids = torch.randint(3, 500, (count, 16), generator=torch.Generator().manual_seed(1))
            prompts = [Prompt(i, row) for i, row in enumerate(ids.tolist())]
            samples = {}
            work = asyncio.create_task(
                pool.collect(prompts, Sampling(TOKENS), lambda s: samples.update({s.index: s}))
            )
            aborted = 0
            while interrupt and not aborted:
                await asyncio.sleep(0.1)
                aborted = len(pool.places[0].running)
                await http.post(f"{url}/abort_request", json={"rid": "", "abort_all": True})
            await work
            return [samples[i] for i in range(count)]

    return asyncio.run(collect())


def score(student, dtype, samples, queue):
    """Without and with replay: |trainer - engine| log-probs, and choices that differ."""
    parallel, hf = initialise(Layout()), read_hf_config(student)
    chunks = build_model(hf, parallel, dtype)
    load_shards(chunks, HfTensors(student), hf, parallel)
    wrapped = wrap_precision(chunks)
    chosen = []
    for module in wrapped[0].modules():
        if isinstance(module, TopKRouter):
            module.register_forward_hook(lambda _, __, out: chosen.append(out[1].nonzero()[:, 1]))
    for replay in (None, RoutingReplay(wrapped)):
        schedule = Schedule(wrapped, parallel, 1.0, replay)
        drift, differ = [], []
        for sample in samples:
            chosen.clear()
            (logp,), _ = schedule.score([sample], Packer(parallel, 128))
            drift.append(np.abs(np.array(sample.rollout_logp) - logp))
            experts = torch.stack(chosen, 1).unflatten(0, (-1, 4)).transpose(1, 2).numpy()
            differ.append((np.sort(sample.experts) != experts).any(-1).ravel())
        drift = np.concatenate(drift)
        figures = drift.mean(), np.quantile(drift, 0.99), drift.max()
        queue.put(Drift(*map(float, figures), float(np.concatenate(differ).mean())))
    shutdown()


class Drift(NamedTuple):
    """Of all response tokens, nats; `changed` is a share of (token, layer)."""

    mean: float
    p99: float
    largest: float
    changed: float


def drifts(student, dtype, samples):
    """Without and with replay."""
    queue = local_context().SimpleQueue()
    run_world(1, score, student, dtype, samples, queue)
    return queue.get(), queue.get()


@pytest.mark.parametrize("interrupt", [False, True])
def test_the_servers_experts(served, student, interrupt):
    """All inputs' and layers', also when an answer was cut off and continued; replayed exactly."""
    dtype, url = served
    samples = generate(url, student, 8, interrupt)
    for sample in samples:
        assert sample.experts.shape == (sample.inputs, 4, 4)
        assert sample.experts.dtype == np.uint8
    own, replayed = drifts(student, dtype, samples)
    assert replayed.changed == 0
    if dtype == "fp32":  # the same weights choose the same experts, but for near ties
        assert own.changed < 0.001
        assert replayed.largest < 1e-5
    else:
        assert own.changed > 0.01


@pytest.mark.parametrize("trainer", ["fp32", "bf16"])
def test_replay_lowers_the_drift(served, student, trainer):
    """The same answers of a bf16 engine, with and without replay."""
    dtype, url = served
    if dtype == "fp32":
        pytest.skip("an fp32 engine and an fp32 trainer choose the same experts")
    own, replayed = drifts(student, trainer, generate(url, student))
    print(f"\nbf16 engine, {trainer} trainer, without replay: {own}\nwith: {replayed}")
    assert replayed.mean < 0.93 * own.mean
    assert replayed.p99 < 0.9 * own.p99


def train(out, student, dtype, url, *more):
    command = [sys.executable, "-m", "iwopd_megatron", "train", str(RECIPE)]
    command += overrides(student, dtype, out) + [f"rollout.servers.urls=[{url}]"]
    command += ["train.rounds=3", "train.warmup_rounds=1", "train.prompts_per_round=32"]
    command += ["train.lr=1e-6", "data.eval=null", *more]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-2000:]
    return [line for line in read_metrics(out) if line["kind"] == "round"]


def test_a_run_replays(served, student, tmp_path):
    """Two processes, several optimiser steps a round; what training reports as drift falls."""
    dtype, url = served
    if dtype == "fp32":
        lines = train(tmp_path / "run", student, dtype, url, "train.minibatches=2")
        assert len(lines) == 3
        assert all(line["drift"] < 1e-5 for line in lines)
        return
    drift = {}
    for replay in (True, False):
        flag = json.dumps(replay)
        lines = train(tmp_path / flag, student, dtype, url, f"rollout.routing_replay={flag}")
        tokens = sum(line["loss_tokens"] for line in lines)
        drift[replay] = sum(line["drift"] * line["loss_tokens"] for line in lines) / tokens
    print(f"\ndrift of a bf16 run: {drift[True]:.5f} with replay, {drift[False]:.5f} without")
    assert drift[True] < 0.95 * drift[False]
