"""Time one training step of a model: plain PyTorch against the Megatron trainer.

    python bench/step.py [--model FOLDER] [--samples 64] [--inputs 30,45] [--steps 30]

On the same samples (default: 64 of the demo's student): plain PyTorch (transformers, padded batch,
materialised log-softmax, AdamW)
on one thread, the Megatron trainer on one process, and on two (tp2 ep2). Ratios compare runs that
alternate within this one command; each process has one thread.
"""

import argparse
import json
import os
import statistics
import time
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"

import torch
import yaml

from iwopd_megatron.batch.objective import DistillationObjective
from iwopd_megatron.batch.packing import Packer
from iwopd_megatron.config.models import Layout
from iwopd_megatron.config.preflight import describe
from iwopd_megatron.config.recipe import Train
from iwopd_megatron.hf.config import read_hf_config
from iwopd_megatron.loss.weighting import token_weights
from iwopd_megatron.models.actor import Schedule
from iwopd_megatron.models.gpt import build_model
from iwopd_megatron.models.optimizer import build_optimizer, wrap_data_parallel
from iwopd_megatron.parity import hf_reference
from iwopd_megatron.runtime.local_world import local_context, start_local
from iwopd_megatron.runtime.parallel import initialise
from iwopd_megatron.weights.hf_reader import HfTensors, load_shards

parser = argparse.ArgumentParser()
parser.add_argument("--model", type=Path, default=Path("recipes/demo/student"))
parser.add_argument("--samples", type=int, default=64)
parser.add_argument("--inputs", default="30,45", help="of the shortest and the longest sample")
parser.add_argument("--steps", type=int, default=30)
parser.add_argument("--layout", default="{tp: 2, ep: 2}", help="of the two processes")
ASKED = parser.parse_args()
FOLDER, STEPS = ASKED.model, ASKED.steps
WARM_UP = STEPS // 6
TRAIN = Train(rounds=1000, lr=1e-5)
SHORTEST, LONGEST = map(int, ASKED.inputs.split(","))
SAMPLES = hf_reference.make_samples(
    read_hf_config(FOLDER).vocab_size,
    [SHORTEST + i % (LONGEST - SHORTEST + 1) for i in range(ASKED.samples)],
    0,
)


def plain_step():
    """A closure that trains transformers' own model one step on the padded batch."""
    experts = "grouped_mm" if read_hf_config(FOLDER).num_experts else "eager"
    model = hf_reference.hf_model(FOLDER, torch.float32, attention="sdpa", experts=experts)
    optimizer = torch.optim.AdamW(model.parameters(), lr=TRAIN.lr)
    width = max(sample.inputs for sample in SAMPLES)
    ids = torch.zeros(len(SAMPLES), width + 1, dtype=torch.long)
    mask = torch.zeros(len(SAMPLES), width, dtype=torch.bool)
    teacher = torch.zeros(len(SAMPLES), width)
    for i, s in enumerate(SAMPLES):
        ids[i, : s.inputs + 1] = torch.tensor(s.prompt_ids + s.response_ids)
        mask[i, len(s.prompt_ids) - 1 : s.inputs] = True
        teacher[i, len(s.prompt_ids) - 1 : s.inputs] = torch.tensor(s.teacher_logp)
    lengths = mask.sum(1, keepdim=True)

    def step():
        optimizer.zero_grad()
        logits = model(ids[:, :-1], use_cache=False).logits
        logp = logits.log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)
        gap = teacher - logp.detach()
        weight = token_weights(gap, mask)
        loss = -(weight * gap * (logp - logp.detach()).exp() / lengths)[mask].sum() / len(SAMPLES)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    return step


def trainer_step(layout):
    """The same step by Megatron's schedule, DDP and distributed optimiser; packing included."""
    parallel = initialise(layout)
    hf = read_hf_config(FOLDER)
    chunks = build_model(hf, parallel)
    load_shards(chunks, HfTensors(FOLDER), hf, parallel)
    wrapped = wrap_data_parallel(chunks, TRAIN)
    optimizer = build_optimizer(wrapped, TRAIN)
    schedule = Schedule(wrapped, parallel)
    objective = DistillationObjective(hf_reference.LOSS, parallel.cp.group)

    def step():
        batches, length = Packer(parallel, 4096)(SAMPLES, "seq_mean_token_mean")
        schedule.accumulate(optimizer, batches, length, objective)
        optimizer.step()

    return step


def seconds(step):
    times = []
    for _ in range(WARM_UP + STEPS):
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
    return statistics.median(times[WARM_UP:])


def measure(layout, with_plain, queue):
    step = trainer_step(layout)
    plain = plain_step() if with_plain else None
    rows = {}
    for _ in range(3):  # alternate, so that a slow minute of the machine hits both
        if plain is not None:
            rows.setdefault("plain", []).append(seconds(plain))
        rows.setdefault("trainer", []).append(seconds(step))
    if os.environ["RANK"] == "0":
        queue.put({name: min(values) for name, values in rows.items()})


def run(world, layout, with_plain):
    queue = local_context().SimpleQueue()
    context = start_local(world, measure, (layout, with_plain, queue))
    while not context.join():
        pass
    return queue.get()


def main():
    torch.set_num_threads(1)
    one = run(1, Layout(), True)
    layout = Layout(**yaml.safe_load(ASKED.layout))
    two = run(2, layout, False)
    tokens = sum(s.inputs for s in SAMPLES)
    print(
        f"one training step, {len(SAMPLES)} samples, {tokens} tokens, fp32 CPU, 1 thread a process"
    )
    print("| step | processes | ms | tokens/s | over plain PyTorch |")
    print("| --- | --- | --- | --- | --- |")
    rows = [
        ("plain PyTorch", 1, one["plain"]),
        ("trainer", 1, one["trainer"]),
        (f"trainer {describe(layout)}", 2, two["trainer"]),
    ]
    for name, processes, value in rows:
        print(
            f"| {name} | {processes} | {value * 1e3:.0f} | {tokens / value:,.0f} "
            f"| {value / one['plain']:.2f} |"
        )
    print(json.dumps({"step_over_plain": round(one["trainer"] / one["plain"], 3)}))


if __name__ == "__main__":
    main()
