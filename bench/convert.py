"""Conversion both ways against `cp -r` of the same bytes, and the peak of anonymous memory.

python bench/convert.py [FOLDER [SIZE ...]]: where the models go (a temporary folder of their own in
it), and which: 1, 4, 8 (GB; Qwen3-30B-A3B's width, 32 experts) or 235b (one layer of
Qwen3-235B-A22B, all of its 128 experts and its vocabulary, 7.3 GB). Random bf16.

Every target is flushed to disk, cp's by `sync` after it. The source is in the page cache: the model
for cp and import, its checkpoint for cp2 and export. Runs take turns, each right after the last
one's output was removed. Medians of ROUNDS after one that warms up; memory is RssAnon above the
interpreter's after its imports.
"""

import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy
import torch
from anonymous_memory import watched

from iwopd_megatron.hf.config import parse_hf_config
from iwopd_megatron.hf.shapes import hf_names, hf_shape
from iwopd_megatron.weights import shards
from iwopd_megatron.weights.convert import hf_to_megatron, megatron_to_hf
from iwopd_megatron.weights.safetensors_file import SafetensorsPlan, SafetensorsWriter

CONFIG = dict(
    model_type="qwen3_moe",
    vocab_size=32768,
    hidden_size=2048,
    intermediate_size=6144,
    num_attention_heads=32,
    num_key_value_heads=4,
    head_dim=128,
    rms_norm_eps=1e-6,
    max_position_embeddings=40960,
    num_experts=32,
    num_experts_per_tok=8,
    moe_intermediate_size=768,
    norm_topk_prob=True,
    rope_theta=1e6,
    tie_word_embeddings=False,
)
FLAGSHIP = CONFIG | dict(
    vocab_size=151936,
    hidden_size=4096,
    intermediate_size=12288,
    num_attention_heads=64,
    num_experts=128,
    moe_intermediate_size=1536,
)
MODELS = {"1": (CONFIG, 2), "4": (CONFIG, 11), "8": (CONFIG, 23), "235b": (FLAGSHIP, 1)}
ROUNDS, WORKERS = 3, 2


def write_model(folder: Path, config: dict, layers: int) -> int:
    """A random model in shards of a gigabyte; its bytes."""
    folder.mkdir()
    config = config | {"num_hidden_layers": layers}
    (folder / "config.json").write_text(json.dumps(config))
    hf = parse_hf_config(config, "config.json")
    shards.SHARD_BYTES = 10**9
    plan, random = SafetensorsPlan(), numpy.random.default_rng(0)
    shapes = {name: hf_shape(name, hf) for name in hf_names(hf)}
    for name, shape in shapes.items():
        plan.add(name, shape, "BF16")
    writer = SafetensorsWriter(plan, folder)
    for name, shape in shapes.items():
        data = bytearray(random.bytes(2 * torch.Size(shape).numel()))
        writer.write(name, torch.frombuffer(data, dtype=torch.bfloat16).view(shape), 0)
    writer.close()
    return plan.nbytes


def convert_here(direction: str, source: str, out: str, template: str) -> None:
    """One conversion in this process, watched, when told to; prints [seconds, peak MB]."""
    print("ready", flush=True)
    input()

    def work() -> None:
        if direction == "import":
            hf_to_megatron(Path(source), Path(out), workers=WORKERS)
        else:
            megatron_to_hf(Path(source), Path(out), Path(template), workers=WORKERS)

    print(json.dumps(watched(work)))


def convert(direction: str, source: Path, out: Path, template: Path) -> list[float]:
    command = [sys.executable, "-W", "ignore", __file__, direction, source, out, template]
    pipe = subprocess.PIPE
    child = subprocess.Popen([str(x) for x in command], stdin=pipe, stdout=pipe, text=True)
    child.stdout.readline()
    shutil.rmtree(out, ignore_errors=True)
    text, _ = child.communicate("\n")
    return json.loads(text.splitlines()[-1])


def copy(source: Path, out: Path) -> tuple[float, float]:
    """Seconds of `cp -r` until it returns, and until its files are on disk."""
    shutil.rmtree(out, ignore_errors=True)
    start = time.perf_counter()
    subprocess.run(["cp", "-r", source, out], check=True)
    returned = time.perf_counter() - start
    subprocess.run(["sync", *out.iterdir()], check=True)
    return returned, time.perf_counter() - start


def measure(folder: Path, size: str) -> dict[str, float]:
    source, nbytes = folder / "hf", write_model(folder / "hf", *MODELS[size])
    subprocess.run(["sync"], check=True)
    runs: dict[str, list[float]] = {}
    peak = {"import": 0.0, "export": 0.0}
    hf_to_megatron(source, folder / "checkpoint", workers=WORKERS)
    for i in range(ROUNDS + 1):
        if i == 1:  # the first round only warms up
            runs.clear()
        for name, key, read in (("import", "cp", "hf"), ("export", "cp2", "checkpoint")):
            returned, flushed = copy(folder / read, folder / "out")
            seconds, mb = convert(name, folder / read, folder / "out", source)
            for what, value in ((key, returned), (f"{key}_sync", flushed), (name, seconds)):
                runs.setdefault(what, []).append(value)
            peak[name] = max(peak[name], mb)
    shutil.rmtree(folder / "checkpoint")
    shutil.rmtree(folder / "out")
    shutil.rmtree(source)
    rates = {key: nbytes / 1e9 / statistics.median(seconds) for key, seconds in runs.items()}
    return rates | {"gb": nbytes / 1e9, "import_mb": peak["import"], "export_mb": peak["export"]}


def ratios(rates: dict[str, float]) -> dict[str, float]:
    return {
        "import_over_cp": rates["import"] / rates["cp_sync"],
        "export_over_cp": rates["export"] / rates["cp2_sync"],
    }


def main() -> None:
    place, *sizes = sys.argv[1:] or [None]
    sizes = sizes or list(MODELS)
    print(f"GB/s, median of {ROUNDS} rounds, workers = {WORKERS}")
    columns = ["cp", "cp_sync", "import", "cp2", "cp2_sync", "export"]
    print(f"| model | GB | {' | '.join(columns)} | import / cp | export / cp | MB in | MB out |")
    print("| --- " * 12 + "|", flush=True)
    results = []
    with tempfile.TemporaryDirectory(dir=place) as folder:
        free, needed = shutil.disk_usage(folder).free, 33e9
        if free < needed:
            sys.exit(f"{folder} has {free / 1e9:.0f} GB free, this needs {needed / 1e9:.0f}.")
        for size in sizes:
            r = measure(Path(folder), size)
            r |= ratios(r)
            figures = [r[key] for key in ("gb", *columns, "import_over_cp", "export_over_cp")]
            cells = [size, *(f"{x:.2f}" for x in figures)]
            cells += [f"{r[key]:.0f}" for key in ("import_mb", "export_mb")]
            print(f"| {' | '.join(cells)} |", flush=True)
            results.append(r)
    summary = {key: min(r[key] for r in results) for key in ratios(results[0])}
    summary["peak_rss_mb"] = max(max(r["import_mb"], r["export_mb"]) for r in results)
    print(json.dumps({key: round(value, 3) for key, value in summary.items()}))


if __name__ == "__main__":
    if sys.argv[1:2] in (["import"], ["export"]):
        convert_here(*sys.argv[1:])
    else:
        main()
