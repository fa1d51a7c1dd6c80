"""Conversion both ways against `cp -r` of the same bytes, and the peak of anonymous memory.

Random bf16 models of Qwen3-30B-A3B's width with 32 experts, 1, 2 and 4 GB, in a temporary folder
(first argument: where). Every target is flushed to disk, cp's by `sync` after it. The source is in
the page cache: the model for cp and import, its checkpoint for cp2 and export. Runs take turns,
each right after the last one's output was removed, since memory long unused is slow to get back on
a virtual machine. Medians of ROUNDS after one that warms up; memory is RssAnon above the
interpreter's after its imports.
"""

import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy
import torch

from iwopd_megatron import safetensors_file
from iwopd_megatron.convert import hf_to_megatron, megatron_to_hf
from iwopd_megatron.mapping import blocks, hf_shape
from iwopd_megatron.safetensors_file import SafetensorsWriter

CONFIG = dict(
    model_type="qwen3_moe", vocab_size=32768, hidden_size=2048, intermediate_size=6144,
    num_attention_heads=32, num_key_value_heads=4, head_dim=128, rms_norm_eps=1e-6,
    max_position_embeddings=40960, num_experts=32, num_experts_per_tok=8,
    moe_intermediate_size=768, norm_topk_prob=True, rope_theta=1e6, tie_word_embeddings=False,
)  # fmt: skip
LAYERS = {1: 2, 2: 5, 4: 11}  # gigabytes -> layers
ROUNDS, WORKERS = 2, 2


def write_model(folder: Path, layers: int) -> int:
    """A random model in shards of a gigabyte; its bytes."""
    folder.mkdir()
    hf = CONFIG | {"num_hidden_layers": layers}
    (folder / "config.json").write_text(json.dumps(hf))
    safetensors_file.SHARD_BYTES = 10**9
    writer, random = SafetensorsWriter(), numpy.random.default_rng(0)
    shapes = {name: hf_shape(name, hf) for block in blocks(hf) for name in block.hf_names}
    for name, shape in shapes.items():
        writer.add(name, shape, "BF16")
    writer.open(folder)
    for name, shape in shapes.items():
        data = bytearray(random.bytes(2 * torch.Size(shape).numel()))
        writer.write(name, torch.frombuffer(data, dtype=torch.bfloat16).view(shape), 0)
    writer.finish()
    return writer.nbytes


def anonymous_mb() -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("RssAnon")).split()[1]) / 1024


def convert_here(direction: str, source: str, out: str, template: str) -> None:
    """One conversion in this process, watched, when told to; prints [seconds, peak MB]."""
    print("ready", flush=True)
    input()
    start, peak, done = anonymous_mb(), 0.0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.005):
            peak = max(peak, anonymous_mb() - start)

    watcher = threading.Thread(target=watch)
    watcher.start()
    began = time.perf_counter()
    if direction == "import":
        hf_to_megatron(Path(source), Path(out), workers=WORKERS)
    else:
        megatron_to_hf(Path(source), Path(out), Path(template), workers=WORKERS)
    seconds = time.perf_counter() - began
    done.set()
    watcher.join()
    print(json.dumps([seconds, peak]))


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


def measure(folder: Path, gigabytes: int) -> dict[str, float]:
    source, nbytes = folder / "hf", write_model(folder / "hf", LAYERS[gigabytes])
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


def main() -> None:
    with tempfile.TemporaryDirectory(dir=sys.argv[1] if len(sys.argv) > 1 else None) as folder:
        free, needed = shutil.disk_usage(folder).free, 4 * max(LAYERS) * 1e9
        if free < needed:
            sys.exit(f"{folder} has {free / 1e9:.0f} GB free, this needs {needed / 1e9:.0f}.")
        results = [measure(Path(folder), gigabytes) for gigabytes in LAYERS]
    print("GB/s, median of", ROUNDS, "rounds, workers =", WORKERS)
    columns = ["cp", "cp_sync", "import", "cp2", "cp2_sync", "export"]
    print(f"| model GB | {' | '.join(columns)} | peak MB in | out |")
    print("| --- " * 9 + "|")
    for r in results:
        rates = " | ".join(f"{r[key]:.2f}" for key in columns)
        print(f"| {r['gb']:.2f} | {rates} | {r['import_mb']:.0f} | {r['export_mb']:.0f} |")
    largest = results[-1]
    summary = {
        "import_over_cp": largest["import"] / largest["cp_sync"],
        "export_over_cp": largest["export"] / largest["cp2_sync"],
        "import_over_unflushed_cp": largest["import"] / largest["cp"],
        "export_over_unflushed_cp": largest["export"] / largest["cp2"],
        "peak_rss_mb": max(max(r["import_mb"], r["export_mb"]) for r in results),
    }
    print(json.dumps({key: round(value, 3) for key, value in summary.items()}))


if __name__ == "__main__":
    if len(sys.argv) == 5:
        convert_here(*sys.argv[1:])
    else:
        main()
