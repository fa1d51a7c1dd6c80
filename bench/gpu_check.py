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
from multiprocessing import get_context
from pathlib import Path

os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
os.environ["OMP_NUM_THREADS"] = "4"
warnings.filterwarnings("ignore")
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.chdir(ROOT)

import torch  # noqa: E402

from iwopd_megatron import backend, device, parity  # noqa: E402
from iwopd_megatron.actor import Schedule  # noqa: E402
from iwopd_megatron.config import Layout, Train, load_recipe, read_hf_config  # noqa: E402
from iwopd_megatron.model import build_model, wrap_precision  # noqa: E402
from iwopd_megatron.objective import PolicyObjective  # noqa: E402
from iwopd_megatron.optimizer import build_optimizer, wrap_data_parallel  # noqa: E402
from iwopd_megatron.parallel import initialise, shutdown, start_local  # noqa: E402
from iwopd_megatron.progress import Progress  # noqa: E402
from iwopd_megatron.runlog import read_metrics  # noqa: E402
from iwopd_megatron.trainer import Trainer  # noqa: E402
from iwopd_megatron.trajectory import pack  # noqa: E402

STEPS, WARM_UP = 8, 3
QWEN = dict(
    model_type="qwen3_moe", num_attention_heads=32, num_key_value_heads=4, head_dim=128,
    vocab_size=151936, rms_norm_eps=1e-6, rope_theta=1e6, max_position_embeddings=40960,
    intermediate_size=6144,
)  # fmt: skip
# Slices of real models: their layer shapes, vocabulary and head, few layers; random weights.
SLICES = {
    "Qwen3-30B-A3B, 4 of 48 layers": QWEN
    | dict(hidden_size=2048, num_hidden_layers=4, num_experts=128, num_experts_per_tok=8,
           moe_intermediate_size=768, norm_topk_prob=True),
    "Qwen3-4B, 6 of 36 layers": QWEN
    | dict(model_type="qwen3", hidden_size=2560, num_hidden_layers=6, num_key_value_heads=8,
           intermediate_size=9728, tie_word_embeddings=True),
}  # fmt: skip
LENGTHS = {"8 x 1024 tokens": [1024] * 8, "1 x 8192 tokens": [8192], "128 x 64 tokens": [64] * 128}


def check_parity(references, queue):
    for dtype, reference in references.items():
        result = parity.compare(Path("recipes/demo/teacher"), reference, Layout(), 256, dtype)
        queue.put((dtype, result, parity.failures(result, reference, dtype)))
    shutdown()


def five_rounds(folder, dtype, queue):
    recipe = load_recipe(
        Path("recipes/demo_tiny_moe.yaml"),
        [
            "student.parallel={}",
            "train.rounds=5",
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
    objective = PolicyObjective(parity.LOSS, parallel.cp.group)
    samples = parity.make_samples(hf["vocab_size"], lengths)
    batches, length = pack(samples, parallel, sum(lengths), "seq_mean_token_mean")

    def on_output(hidden, model, batch):
        return objective(schedule.logprobs(hidden, model, batch), batch)

    times = {"forward + backward": [], "optimiser": [], "forward only": []}
    for _ in range(STEPS + WARM_UP):
        for chunk in wrapped:
            chunk.zero_grad_buffer()
        optimizer.zero_grad()
        marks = [_now()]
        schedule.run(batches, length, on_output)
        marks.append(_now())
        optimizer.step()
        marks.append(_now())
        schedule.run(batches, length, on_output, forward_only=True)
        marks.append(_now())
        for name, start, end in zip(times, marks, marks[1:], strict=False):
            times[name].append(end - start)
    active = sum(p.numel() for n, p in chunks[0].named_parameters() if "embedding" not in n)
    if "num_experts" in hf:
        experts = sum(p.numel() for n, p in chunks[0].named_parameters() if ".experts." in n)
        active += experts * hf["num_experts_per_tok"] / hf["num_experts"] - experts
    if hf.get("tie_word_embeddings"):
        active += hf["vocab_size"] * hf["hidden_size"]
    queue.put({
        "ms": {name: 1e3 * statistics.median(values[WARM_UP:]) for name, values in times.items()},
        "tokens": sum(lengths),
        "active": active,
        "peak_gib": device.peak_memory_bytes() / 2**30,
    })  # fmt: skip
    shutdown()


def _now():
    device.synchronize()
    return time.perf_counter()


def in_world(function, *args):
    """Run a function on one rank and return what it put into its queue."""
    queue = get_context("spawn").Queue()
    context = start_local(1, function, (*args, queue))
    values = []
    while not context.join(timeout=0.2):
        while not queue.empty():
            values.append(queue.get())
    while not queue.empty():
        values.append(queue.get())
    return values


def main():
    if not torch.cuda.is_available():
        sys.exit(
            "error: gpu-check needs a CUDA GPU and a torch built for it; "
            "`make demo` runs without one."
        )
    name = torch.cuda.get_device_name()
    te = "TransformerEngine" if backend.has_transformer_engine() else "torch-native modules"
    print(f"{name}, torch {torch.__version__}, CUDA {torch.version.cuda}, {te}\n")
    folder = Path("recipes/demo/teacher")
    samples = parity.make_samples(read_hf_config(folder)["vocab_size"], [48, 33, 64, 57, 20, 41], 0)
    references = {d: parity.reference(folder, samples, d == "bf16") for d in ("fp32", "bf16")}
    failed = False
    print(
        "| parity with Hugging Face | logits | gradients | loss | verdict |\n"
        "| --- | --- | --- | --- | --- |"
    )
    for dtype, result, problems in in_world(check_parity, references):
        failed |= bool(problems)
        print(f"| {dtype} ({'max' if dtype == 'fp32' else 'mean'}) | {result['logits']:.2g} | "
              f"{result['grads']:.2g} | {result['loss']:.2g} | "
              f"{'; '.join(problems) or 'agrees'} |", flush=True)  # fmt: skip
    print(
        "\n| demo, round 5, one GPU | seconds | generate | score | train | drift (nats) |\n"
        + "| --- " * 6
        + "|"
    )
    for dtype in ("fp32", "bf16"):
        with tempfile.TemporaryDirectory() as run:
            last = in_world(five_rounds, run + "/run", dtype)[0][-1]
        phases = " | ".join(f"{last['time'][k]:.3f}" for k in ("generate", "score", "train"))
        print(f"| {dtype} | {last['seconds']:.3f} | {phases} | {last['drift']:.2g} |", flush=True)
    print("\n| bf16 step, one micro-batch | packed as | recompute | forward + backward ms "
          "| forward ms | optimiser ms | tokens/s | model TFLOP/s | peak GiB |\n"
          + "| --- " * 9 + "|")  # fmt: skip
    results = {}
    for model, hf in SLICES.items():
        for packed, lengths in LENGTHS.items():
            for recompute in ("none", "full") if packed == "8 x 1024 tokens" else ("none",):
                r = in_world(time_slice, hf, lengths, recompute)[0]
                train_ms, ms = r["ms"]["forward + backward"], r["ms"]
                tflops = 6 * r["active"] * r["tokens"] / train_ms / 1e9
                speed = r["tokens"] / (train_ms + ms["optimiser"]) * 1e3
                print(f"| {model} | {packed} | {recompute} | {train_ms:.1f} "
                      f"| {ms['forward only']:.1f} | {ms['optimiser']:.1f} | {speed:,.0f} "
                      f"| {tflops:.0f} | {r['peak_gib']:.1f} |", flush=True)  # fmt: skip
                results[f"{model}, {packed}, {recompute}"] = round(train_ms, 2)
    print(json.dumps({"gpu": name, "parity": not failed, "forward_backward_ms": results}))
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
