"""Megatron's `resharding` (refit) against the project's weight stream, into another layout.

Two processes over gloo hold one random model in one layout and fill another model, of the layout
after the arrow, every weight of which is compared with the one that the folder's tensors give. A
row's figures are of one run in which both take turns: medians of REPEATS after one that warms up
(it also makes refit's plan), of the slower process; peak is anonymous memory above both models;
bytes received are the sum over the processes.
"""

from __future__ import annotations

import contextlib
import json
import logging
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from anonymous_memory import watched
from megatron.core.resharding import refit

from iwopd_megatron.config.models import Layout
from iwopd_megatron.hf.config import HfConfig, read_hf_config
from iwopd_megatron.models.gpt import build_model
from iwopd_megatron.parity.rehearse import write_model
from iwopd_megatron.runtime.local_world import local_context, start_local
from iwopd_megatron.runtime.parallel import Parallel, gather, initialise, shutdown
from iwopd_megatron.weights.hf_reader import HfTensors, load_shards
from iwopd_megatron.weights.sync import WeightStream
from iwopd_megatron.weights.table import mapped_parameters

REPEATS = 5
SHAPE = dict(
    vocab_size=8192,
    hidden_size=512,
    intermediate_size=1536,
    num_hidden_layers=8,
    num_attention_heads=8,
    num_key_value_heads=4,
    head_dim=64,
    max_position_embeddings=256,
    rms_norm_eps=1e-6,
)
EXPERTS = dict(num_experts=8, num_experts_per_tok=2, moe_intermediate_size=384, norm_topk_prob=True)
MODELS = {"dense": {"tie_word_embeddings": False}, "MoE": EXPERTS}
CASES = [
    ("dense", {"tp": 2}, {}),
    ("dense", {}, {"tp": 2}),
    ("dense", {"pp": 2}, {"tp": 2}),
    ("MoE", {"tp": 2}, {}),
    ("MoE", {"ep": 2}, {}),
    ("MoE", {}, {"ep": 2}),
    ("MoE", {"tp": 2, "etp": 2}, {}),
    ("MoE", {}, {"pp": 2, "vpp": 2}),
]


@torch.no_grad()
def stream_into(stream: WeightStream, chunks: list, hf: HfConfig, parallel: Parallel) -> None:
    """The project's way: cut every whole tensor as it comes, and let it go."""
    waiting = [x for chunk in chunks for x in mapped_parameters(chunk, hf)]
    users = {name: [x for x in waiting if name in x.hf_names] for name, _ in _names(waiting)}
    have: dict[str, torch.Tensor] = {}
    for name, whole in stream:
        have[name] = whole
        for mapped in users.get(name, []):
            if all(other in have for other in mapped.hf_names):
                axis = parallel.etp if mapped.is_expert else parallel.tp
                parts = [have[other] for other in mapped.hf_names]
                mapped.parameter.copy_(mapped.sharding.shard(parts, axis.rank, axis.size, hf))
                for other in mapped.hf_names:
                    have.pop(other)
        if name not in users:
            have.pop(name)


def _names(mapped: list) -> Iterator[tuple[str, object]]:
    return ((name, x) for x in mapped for name in x.hf_names)


def on_cpu() -> None:
    """Stand in for what refit alone asks of CUDA: freeing a cache, pinning host memory."""
    empty = torch.empty

    def unpinned(*args, pin_memory=False, **kwargs):
        return empty(*args, **kwargs)

    torch.empty = unpinned
    torch.cuda.empty_cache = lambda: None


def refit_into(source: list, chunks: list) -> None:
    """Megatron's way; its interface has one model, or a list."""
    refit.swap_model_weights(source, chunks, "gloo")


@contextlib.contextmanager
def counted(received: list[int]) -> Iterator[None]:
    """Add to `received` the bytes that collectives and messages bring from other processes."""
    originals = {
        name: getattr(dist, name)
        for name in ("all_gather_into_tensor", "broadcast", "batch_isend_irecv")
    }

    def gathered(output, own, **more):
        received.append(output.nbytes - own.nbytes)
        return originals["all_gather_into_tensor"](output, own, **more)

    def broadcast(tensor, source, **more):
        received.append(tensor.nbytes if dist.get_rank() != source else 0)
        return originals["broadcast"](tensor, source, **more)

    def messages(operations):
        received.append(sum(x.tensor.nbytes for x in operations if x.op is dist.irecv))
        return originals["batch_isend_irecv"](operations)

    dist.all_gather_into_tensor, dist.broadcast = gathered, broadcast
    dist.batch_isend_irecv = messages
    try:
        yield
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)


def check(way: Callable[[], None], chunks: list, wanted: list) -> tuple[str, int]:
    """How many of the model's parameters are wrong after one transfer, or why it was refused."""
    for chunk in chunks:
        for parameter in chunk.parameters():
            parameter.data.fill_(-7)
    received: list[int] = []
    try:
        with counted(received):
            way()
    except RuntimeError as error:
        return f"refused: {str(error).split('.')[0][:40]}...", 0
    pairs = [
        (a, b)
        for one, other in zip(chunks, wanted, strict=True)
        for a, b in zip(one.parameters(), other.parameters(), strict=True)
    ]
    wrong = sum(not torch.equal(a, b) for a, b in pairs)
    total, bad = (sum(x) for x in zip(*gather((len(pairs), wrong)), strict=True))
    return ("exact" if not bad else f"{bad} of {total} wrong"), sum(gather(sum(received)))


def run(folder: Path, source: dict, target: dict, queue) -> None:
    logging.disable(logging.WARNING)
    on_cpu()
    hf = read_hf_config(folder)
    first = initialise(Layout(**source))
    own = build_model(hf, first)
    load_shards(own, HfTensors(folder), hf, first)
    stream = WeightStream(own, hf, first)
    second = initialise(Layout(**target))
    chunks, wanted = build_model(hf, second), build_model(hf, second)
    load_shards(wanted, HfTensors(folder), hf, second)
    refit.clear_all_caches()
    ways = {
        "stream": lambda: stream_into(stream, chunks, hf, second),
        "refit": lambda: refit_into(own, chunks),
    }
    found = {name: check(way, chunks, wanted) for name, way in ways.items()}
    timed = {name: way for name, way in ways.items() if found[name][0] == "exact"}
    figures: dict[str, list] = {name: [] for name in timed}
    for _ in range(REPEATS):
        for name, way in timed.items():
            dist.barrier()
            seconds, peak = zip(*gather(watched(way, every=0.002)), strict=True)
            figures[name].append((max(seconds), max(peak)))
    if first.is_main:
        medians = {
            name: [statistics.median(column) for column in zip(*rows, strict=True)]
            for name, rows in figures.items()
        }
        queue.put((found, medians))
    shutdown()


def main() -> None:
    ratios = {}
    print("| model | layouts | stream | s | peak MB | MB received | refit | s | peak MB "
          "| MB received | refit / stream s |")  # fmt: skip
    print("|" + " --- |" * 11)
    with tempfile.TemporaryDirectory() as place:
        for name, more in MODELS.items():
            write_model(Path(place) / name, SHAPE | more)
        for name, source, target in CASES:
            queue = local_context().SimpleQueue()
            context = start_local(2, run, (Path(place) / name, source, target, queue))
            while not context.join():
                pass
            found, medians = queue.get()
            layouts = " → ".join(
                " ".join(f"{axis}{n}" for axis, n in axes.items()) or "dp2"
                for axes in (source, target)
            )
            cells = []
            for way in ("stream", "refit"):
                seconds, peak = medians.get(way, ("", ""))
                cells.append(found[way][0])
                cells += [f"{seconds:.3f}", f"{peak:.0f}", f"{found[way][1] / 1e6:.0f}"] if (
                    way in medians
                ) else ["", "", ""]  # fmt: skip
            ratio = ""
            if len(medians) == 2:
                ratio = f"{medians['refit'][0] / medians['stream'][0]:.2f}"
                ratios[f"{name} {layouts}"] = float(ratio)
            print("| " + " | ".join([name, layouts, *cells, ratio]) + " |", flush=True)
    print(json.dumps({"refit_over_stream_seconds": ratios}))


if __name__ == "__main__":
    sys.exit(main())
