"""One step of Megatron's Muon in layouts of two processes, against one process. Megatron >= 0.18.

Same weights and same random gradient everywhere, so the updates should be the same: a cell is the
largest relative difference (Frobenius) of an update of that kind of tensor. It needs
emerging-optimizers 0.3.0, which setup does not install.
"""

import json
import logging
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

import numpy
import torch
from conftest import EXPERTS, SHAPE

from iwopd_megatron.config.models import Layout
from iwopd_megatron.config.recipe import Train
from iwopd_megatron.hf.config import read_hf_config
from iwopd_megatron.models.gpt import build_model
from iwopd_megatron.models.optimizer import build_optimizer, wrap_data_parallel
from iwopd_megatron.parity.rehearse import write_model
from iwopd_megatron.runtime.local_world import local_context, start_local
from iwopd_megatron.runtime.megatron import megatron_optimizer
from iwopd_megatron.runtime.parallel import initialise, shutdown
from iwopd_megatron.weights.hf_reader import HfTensors, load_shards
from iwopd_megatron.weights.sync import WeightStream
from iwopd_megatron.weights.table import mapped_parameters

MODELS = {
    "dense": {"tie_word_embeddings": False},
    "MoE": EXPERTS | {"norm_topk_prob": True},
}
CASES = [
    ("dense", {"pp": 2}, "duplicated"),
    ("dense", {"tp": 2}, "duplicated"),
    ("dense", {"tp": 2}, "distributed"),
    ("dense", {"tp": 2}, "blockwise"),
    ("MoE", {"tp": 2}, "duplicated"),
    ("MoE", {"tp": 2, "etp": 2}, "duplicated"),
    ("MoE", {"ep": 2}, "duplicated"),
]
KINDS = ("embed_tokens", "norm", "self_attn", "mlp")


def updates(folder: Path, axes: dict, mode: str, queue) -> None:
    """Rank 0 puts (gradient norm, what a step adds to every whole tensor by name) into `queue`."""
    logging.disable(logging.WARNING)
    parallel, hf = initialise(Layout(**axes)), read_hf_config(folder)
    chunks = build_model(hf, parallel)
    load_shards(chunks, HfTensors(folder), hf, parallel)
    train = Train(distributed_optimizer=False)
    wrapped = wrap_data_parallel(chunks, train)
    build_optimizer(wrapped, train)  # its AdamW is what Muon leaves the vectors to
    optimizer = megatron_optimizer.get_megatron_optimizer(
        megatron_optimizer.OptimizerConfig(
            optimizer="muon",
            lr=1e-2,
            weight_decay=0.0,
            clip_grad=1e9,
            muon_tp_mode=mode,
            params_dtype=torch.float32,
        ),
        wrapped,
    )
    for part in optimizer.chained_optimizers:
        part.init_state_fn(part.optimizer, part.config)
    stream = WeightStream(chunks, hf, parallel)
    before = {name: tensor.clone() for name, tensor in stream}
    names = sorted(before)
    gradient = {
        name: torch.randn(before[name].shape, generator=torch.Generator().manual_seed(i))
        for i, name in enumerate(names)
    }
    for chunk in wrapped:
        chunk.zero_grad_buffer()
        for x in mapped_parameters(chunk.module, hf):
            axis = parallel.etp if x.is_expert else parallel.tp
            whole = [gradient[name] for name in x.hf_names]
            x.parameter.main_grad.copy_(x.sharding.shard(whole, axis.rank, axis.size, hf))
    _, norm, _ = optimizer.step()
    after = {name: (tensor - before[name]).numpy() for name, tensor in stream}
    if parallel.is_main:
        queue.put((float(norm), after))
    shutdown()


def run(world: int, *arguments) -> tuple[float, dict]:
    queue = local_context().Queue()
    context = start_local(world, updates, (*arguments, queue))
    found = queue.get(timeout=300)
    while not context.join():
        pass
    return found


def main() -> None:
    print("| model | layout | muon_tp_mode | norm | " + " | ".join(KINDS) + " |")
    print("|" + " --- |" * (4 + len(KINDS)))
    result, one = {}, {}
    with tempfile.TemporaryDirectory() as place:
        for model, more in MODELS.items():
            write_model(Path(place) / model, SHAPE | more)
            one[model] = run(1, Path(place) / model, {}, "duplicated")
        for model, axes, mode in CASES:
            norm, found = run(2, Path(place) / model, axes, mode)
            worst = dict.fromkeys(KINDS, 0.0)
            for name, update in found.items():
                expected = one[model][1][name]
                error = numpy.linalg.norm(update - expected) / numpy.linalg.norm(expected)
                kind = next((kind for kind in KINDS if kind in name and "router" not in name), None)
                if kind:
                    worst[kind] = max(worst[kind], float(error))
            layout = " ".join(f"{axis}{n}" for axis, n in axes.items())
            cells = [f"{value:.2g}" for value in worst.values()]
            ratio = f"{norm / one[model][0]:.6f}"
            print("| " + " | ".join([model, layout, mode, ratio, *cells]) + " |", flush=True)
            result[f"{model} {layout} {mode}"] = round(max(worst.values()), 6)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
