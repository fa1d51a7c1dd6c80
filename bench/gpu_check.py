"""One GPU, real kernels: Hugging Face parity (fp32, bf16), five demo rounds, step time, memory.

Prints Markdown for bench/RESULTS.md and ends with one JSON line; exits non-zero if parity fails.
Needs only torch with CUDA and the project's dependencies.
"""

import json
import os
import statistics
import sys
import tempfile
import time
import warnings
from pathlib import Path

os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
os.environ["OMP_NUM_THREADS"] = "4"
warnings.filterwarnings("ignore")
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch

from iwopd_megatron.batch.objective import DistillationObjective
from iwopd_megatron.batch.packing import Packer
from iwopd_megatron.config.load import load_recipe
from iwopd_megatron.config.models import Layout
from iwopd_megatron.config.recipe import Train
from iwopd_megatron.hf.config import parse_hf_config, read_hf_config
from iwopd_megatron.models import layer_specs
from iwopd_megatron.models.actor import Schedule
from iwopd_megatron.models.gpt import build_model, wrap_precision
from iwopd_megatron.models.optimizer import build_optimizer, wrap_data_parallel
from iwopd_megatron.parity import (
    hf_reference,
    parity,
)
from iwopd_megatron.records.runlog import read_metrics
from iwopd_megatron.runtime import device
from iwopd_megatron.runtime.local_world import local_context, start_local
from iwopd_megatron.runtime.parallel import initialise, shutdown
from iwopd_megatron.train.progress import Progress
from iwopd_megatron.train.trainer import Trainer

STEPS, WARM_UP = 8, 3
QWEN = dict(
    model_type="qwen3_moe",
    num_attention_heads=32,
    num_key_value_heads=4,
    head_dim=128,
    vocab_size=151936,
    rms_norm_eps=1e-6,
    rope_theta=1e6,
    max_position_embeddings=40960,
    intermediate_size=6144,
)
# Slices of real models: their layer shapes, vocabulary and head, few layers; random weights.
SLICES = {
    "Qwen3-30B-A3B, 4 of 48 layers": QWEN
    | dict(
        hidden_size=2048,
        num_hidden_layers=4,
        num_experts=128,
        num_experts_per_tok=8,
        moe_intermediate_size=768,
        norm_topk_prob=True,
    ),
    "Qwen3-4B, 6 of 36 layers": QWEN
    | dict(
        model_type="qwen3",
        hidden_size=2560,
        num_hidden_layers=6,
        num_key_value_heads=8,
        intermediate_size=9728,
        tie_word_embeddings=True,
    ),
}
LENGTHS = {"8 x 1024 tokens": [1024] * 8, "1 x 8192 tokens": [8192], "128 x 64 tokens": [64] * 128}


def check_parity(references, queue):
    for dtype, reference in references.items():
        result = parity.compare(ROOT / "recipes/demo/teacher", reference, Layout(), 256, dtype)
        queue.put((dtype, result, parity.failures(result, reference, dtype)))
    shutdown()


def five_rounds(folder, dtype, queue):
    recipe = load_recipe(
        ROOT / "recipes/demo_tiny_moe.yaml",
        [
            "student.parallel={}",
            "train.rounds=5",
            "train.warmup_rounds=0",
            f"out={folder}",
            f"student.dtype={dtype}",
            f"teacher.dtype={dtype}",
        ],
    )
    parallel = initialise(recipe.student.parallel, recipe.train.seed)
    with Progress(5, False) as progress:
        Trainer(recipe, parallel, progress).run()
    queue.put([line for line in read_metrics(Path(folder)) if line["kind"] == "round"])
    shutdown()


def time_slice(hf, lengths, recompute, queue):
    """Median step, and its parts, of one packed micro-batch in bf16 with fp32 master weights."""
    parallel = initialise(Layout())
    chunks = build_model(hf, parallel, "bf16", recompute)
    train = Train(rounds=100)
    wrapped = wrap_data_parallel(wrap_precision(chunks), train)
    optimizer = build_optimizer(wrapped, train)
    schedule = Schedule(wrapped, parallel)
    objective = DistillationObjective(hf_reference.LOSS, parallel.cp.group)
    samples = hf_reference.make_samples(hf.vocab_size, lengths)
    batches, length = Packer(parallel, sum(lengths))(samples, "seq_mean_token_mean")

    times = {"forward + backward": [], "optimiser": [], "forward only": []}
    for _ in range(STEPS + WARM_UP):
        marks = [_now()]
        schedule.accumulate(optimizer, batches, length, objective)
        marks.append(_now())
        optimizer.step()
        marks.append(_now())
        schedule.run(batches, length, schedule.loss_of(objective), forward_only=True)
        marks.append(_now())
        for name, start, end in zip(times, marks, marks[1:], strict=False):
            times[name].append(end - start)
    active = sum(p.numel() for n, p in chunks[0].named_parameters() if "embedding" not in n)
    if hf.num_experts:
        experts = sum(p.numel() for n, p in chunks[0].named_parameters() if ".experts." in n)
        active += experts * hf.num_experts_per_tok / hf.num_experts - experts
    if hf.tie_word_embeddings:
        active += hf.vocab_size * hf.hidden_size
    queue.put(
        {
            "ms": {
                name: 1e3 * statistics.median(values[WARM_UP:]) for name, values in times.items()
            },
            "tokens": sum(lengths),
            "active": active,
            "peak_gib": device.peak_memory_bytes() / 2**30,
        }
    )
    shutdown()


def _now():
    device.synchronize()
    return time.perf_counter()


def in_world(function, *args):
    """Run a function on one rank and return what it put into its queue."""
    queue = local_context().Queue()
    context = start_local(1, function, (*args, queue))
    values = []
    while not context.join(timeout=0.2):
        while not queue.empty():
            values.append(queue.get())
    while not queue.empty():
        values.append(queue.get())
    return values


def print_heading(*columns):
    print("\n| " + " | ".join(columns) + " |\n" + "| --- " * len(columns) + "|")


def print_row(*cells):
    print("| " + " | ".join(cells) + " |", flush=True)


def parity_table():
    """Returns whether both types agree with Hugging Face."""
    folder = ROOT / "recipes/demo/teacher"
    vocab = read_hf_config(folder).vocab_size
    samples = hf_reference.make_samples(vocab, [48, 33, 64, 57, 20, 41], pad_id=0)
    references = {
        d: hf_reference.compute_reference(folder, samples, d == "bf16") for d in ("fp32", "bf16")
    }
    print_heading("parity with Hugging Face", "logits", "gradients", "loss", "verdict")
    agrees = True
    for dtype, result, problems in in_world(check_parity, references):
        kind = "max" if dtype == "fp32" else "mean"
        errors = [f"{result[key]:.2g}" for key in ("logits", "grads", "loss")]
        print_row(f"{dtype} ({kind} error)", *errors, "; ".join(problems) or "agrees")
        agrees = agrees and not problems
    return agrees


def demo_table():
    """The phases of the demo's fifth round."""
    phases = ("generate", "score", "train")
    print_heading("demo, round 5", "seconds", *phases, "drift (nats)")
    for dtype in ("fp32", "bf16"):
        with tempfile.TemporaryDirectory() as run:
            last = in_world(five_rounds, run + "/run", dtype)[0][-1]
        seconds = [f"{last['time'][phase]:.3f}" for phase in phases]
        print_row(dtype, f"{last['seconds']:.3f}", *seconds, f"{last['drift']:.2g}")


def step_table():
    """Times of one training step on slices of real models; returns forward + backward ms."""
    print_heading(
        "bf16 step, one micro-batch",
        "packed as",
        "recompute",
        "forward + backward ms",
        "forward ms",
        "optimiser ms",
        "tokens/s",
        "model TFLOP/s",
        "peak GiB",
    )
    results = {}
    for model, sizes in SLICES.items():
        hf = parse_hf_config(sizes, model)
        for packed, lengths in LENGTHS.items():
            for recompute in ("none", "full") if packed == "8 x 1024 tokens" else ("none",):
                r = in_world(time_slice, hf, lengths, recompute)[0]
                train, optimiser = r["ms"]["forward + backward"], r["ms"]["optimiser"]
                print_row(
                    model,
                    packed,
                    recompute,
                    f"{train:.1f}",
                    f"{r['ms']['forward only']:.1f}",
                    f"{optimiser:.1f}",
                    f"{r['tokens'] / (train + optimiser) * 1e3:,.0f}",
                    f"{6 * r['active'] * r['tokens'] / train / 1e9:.0f}",
                    f"{r['peak_gib']:.1f}",
                )
                results[f"{model}, {packed}, {recompute}"] = round(train, 2)
    return results


def main():
    if not torch.cuda.is_available():
        sys.exit("error: gpu-check needs a CUDA GPU and a torch for it; `make demo` needs neither.")
    os.chdir(ROOT)  # recipes name their files relative to the repository
    name = torch.cuda.get_device_name()
    modules = (
        "TransformerEngine"
        if layer_specs.has_transformer_engine(torch.bfloat16)
        else "torch-native modules"
    )
    print(f"{name}, torch {torch.__version__}, CUDA {torch.version.cuda}, {modules}")
    agrees = parity_table()
    demo_table()
    results = step_table()
    print(json.dumps({"gpu": name, "parity": agrees, "forward_backward_ms": results}))
    sys.exit(0 if agrees else 1)


if __name__ == "__main__":
    main()
