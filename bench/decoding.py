"""One step of the embedded engine at Qwen3-0.6B's shapes in fp32, as it was and as it is.

Two processes with the same random weights take turns, a step each: as it was (plain products, small
pages, tokens drawn from all rows at once, one thread), and as it is, on one thread and on more. The
same prompts and random numbers; tokens must agree. A plain copy beside them says what memory gives.
"""

import argparse
import json
import multiprocessing
import os
import statistics
import tempfile
import time
from pathlib import Path

import torch
from real_shape import SHAPE

from iwopd_megatron.hf.config import read_hf_config
from iwopd_megatron.rollout.decoder import Decoder
from iwopd_megatron.rollout.drawing import draw
from iwopd_megatron.rollout.engine import Sampling
from iwopd_megatron.rollout.threads import Threads
from iwopd_megatron.runtime import device
from iwopd_megatron.runtime.quiet import quiet

CONTEXT = 64
BEFORE = "as it was"


def plain_draw(logits, uniform, sampling):
    """As it was: the whole batch in every pass."""
    logp = (logits / (sampling.temperature or 1.0)).log_softmax(-1)
    cdf = logp.double().exp().cumsum(-1)
    token = torch.searchsorted(cdf, (uniform * cdf[:, -1])[:, None], right=True).squeeze(1)
    token = token.clamp(max=logp.shape[-1] - 1)
    return token, logp.gather(-1, token[:, None]).squeeze(1)


def shared(packed, threads):
    """The same copies, multiplied on other threads."""
    layers = [
        type(layer)(*(one and one._replace(threads=threads) for one in layer))
        for layer in packed.layers
    ]
    return type(packed)(layers, packed.head._replace(threads=threads))


@torch.inference_mode()
def serve(folder, args, is_before, pipe):
    """Time what the pipe names: a kind of step, or a copy."""
    torch.set_num_threads(1)
    model = Decoder(read_hf_config(folder), torch.float32, torch.device("cpu"))
    generator = torch.Generator().manual_seed(1)
    for weight in model.weights.values():
        weight.normal_(0, 0.02, generator=generator) if weight.dim() > 1 else weight.fill_(1)
    ids = torch.randint(0, 1000, (args.rows, CONTEXT), generator=generator)
    uniform = torch.rand(args.steps, args.rows, dtype=torch.float64, generator=generator)
    positions = torch.arange(CONTEXT).expand(args.rows, -1)
    copies, seconds = {}, 0.0
    if is_before:
        copies[1] = None
        source, target = torch.ones(2**25), torch.zeros(2**25)
    else:
        threads = {count: Threads(count) for count in args.threads}
        begin = time.perf_counter()
        packed = model.packed(args.rows, 10**6, threads[max(args.threads)])
        seconds = time.perf_counter() - begin
        copies = {count: shared(packed, own) for count, own in threads.items()}
    caches = {count: model.new_cache(args.rows, CONTEXT + args.steps) for count in copies}
    for cache in caches.values():
        model(ids, positions, cache, 0, None)
    pipe.send(seconds)
    while (asked := pipe.recv()) is not None:
        step, count = asked
        begin, cpu, found = time.perf_counter(), time.process_time(), None
        if count == 0:
            target.copy_(source)
        else:
            with device.plain_torch():
                logits = model(
                    ids[:, :1], positions[:, -1:] + 1 + step, caches[count], CONTEXT + step, None,
                    copies[count],
                )  # fmt: skip
                drawing = plain_draw if is_before else draw
                found = drawing(logits, uniform[step], Sampling(args.steps))
        took = time.perf_counter() - begin, time.process_time() - cpu
        pipe.send((took, found and [one.tolist() for one in found]))


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, len(os.sched_getaffinity(0))])
    args = parser.parse_args()
    context, pipes, largest = multiprocessing.get_context("spawn"), [], 0.0
    with tempfile.TemporaryDirectory() as name:
        (Path(name) / "config.json").write_text(json.dumps(SHAPE))
        for is_before in (True, False):
            os.environ["THP_MEM_ALLOC_ENABLE"] = str(int(not is_before))
            here, there = context.Pipe()
            values = Path(name), args, is_before, there
            context.Process(target=serve, args=values, daemon=True).start()
            pipes.append(here)
        packing = [pipe.recv() for pipe in pipes][1]
    before, now = pipes
    kinds = {BEFORE: (before, 1), "copy of 128 MiB": (before, 0)}
    kinds |= {f"as it is, {count} threads": (now, count) for count in args.threads}
    found = {name: [] for name in kinds}
    for step in range(args.steps):
        drawn = []
        for name, (pipe, count) in kinds.items():
            pipe.send((step, count))
            took, result = pipe.recv()
            found[name].append(took)
            drawn += [] if result is None else [result]
        for tokens, logps in drawn[1:]:
            assert tokens == drawn[0][0] and (tokens, logps) == tuple(drawn[1])
            differences = (abs(a - b) for a, b in zip(logps, drawn[0][1], strict=True))
            largest = max(largest, *differences)
    for pipe in pipes:
        pipe.send(None)
    print(f"packing {packing:.1f} s; log-probs differ by at most {largest:.1e}, no token does;")
    print("between numbers of threads not a bit does")
    print("| step | wall, s | least wall, s | CPU of all threads, s | times as fast, median wall |")
    print("| --- | --- | --- | --- | --- |")
    walls = {name: statistics.median(wall for wall, _ in times) for name, times in found.items()}
    for name, times in found.items():
        least, cpu = min(wall for wall, _ in times), statistics.median(cpu for _, cpu in times)
        ratio = walls[BEFORE] / walls[name]
        print(f"| {name} | {walls[name]:.3f} | {least:.3f} | {cpu:.3f} | {ratio:.2f} |")


if __name__ == "__main__":
    quiet()
    main()
