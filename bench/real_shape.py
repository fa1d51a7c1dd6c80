"""One run of Qwen3-0.6B's real shapes in fp32 on this machine's CPU: memory and time by phase.

Random weights, a teacher of the same size embedded with offload, 4 prompts of 512 new tokens, two
rounds, a checkpoint and an export, through what `iwopd train` runs. A watcher beside the run adds
up its processes' memory five times a second: resident, and of that what no file backs
(smaps_rollup). `--layers` makes a smaller model. bench/decoding.py times the engine's step alone.
"""

import argparse
import contextlib
import json
import os
import resource
import shutil
import sys
import tempfile
import threading
import time
from pathlib import Path

import psutil
import torch
import yaml
from safetensors.torch import save_file

from iwopd_megatron.cli import worker
from iwopd_megatron.config.load import load_recipe
from iwopd_megatron.data.before_start import check_before_start
from iwopd_megatron.hf.config import read_hf_config
from iwopd_megatron.hf.shapes import hf_names, hf_shape
from iwopd_megatron.toy_task import SYMBOLS, problems, write_jsonl, write_tokenizer
from iwopd_megatron.train.round import Clock
from iwopd_megatron.train.saver import Saver
from iwopd_megatron.train.trainer import Trainer

GIB = 2**30
SHAPE = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "vocab_size": 151936,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000,
    "tie_word_embeddings": True,
    "hidden_act": "silu",
    "pad_token_id": 0,
    "eos_token_id": 1,
    "torch_dtype": "float32",
}
PAGE = resource.getpagesize()


def write_folder(folder, layers, seed):
    """A model folder: the shapes, a tokenizer of one token a character, random weights."""
    folder.mkdir(parents=True)
    config = SHAPE | {"num_hidden_layers": layers}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 1}))
    rest = [f"<{i}>" for i in range(len(SYMBOLS), config["vocab_size"])]
    write_tokenizer(folder, [*SYMBOLS, *rest])
    hf, generator = read_hf_config(folder), torch.Generator().manual_seed(seed)
    tensors = {}
    for name in hf_names(hf):
        shape = hf_shape(name, hf)
        tensors[name] = torch.ones(shape)
        if len(shape) > 1:
            tensors[name].normal_(0, 0.02, generator=generator)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def in_another_process(function, *args):
    """Run a function in a child, whose memory goes with it."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            function(*args)
            code = 0
        finally:
            os._exit(code)
    _, status = os.waitpid(pid, 0)
    return status


def write_recipe(place, args):
    """The recipe as a user would write it for this machine."""
    write_jsonl(
        place / "train.jsonl", (one for _, one in zip(range(64), problems(1), strict=False))
    )
    recipe = {
        "out": str(place / "run"),
        "student": {"hf": str(place / "student"), "recompute": args.recompute},
        "teacher": {"hf": str(place / "teacher"), "offload": True},
        "data": {"train": str(place / "train.jsonl")},
        "rollout": {
            "max_prompt_tokens": 32,
            "max_response_tokens": args.tokens,
            "batch_size": args.rows,
        },
        "train": {
            "rounds": 2,
            "prompts_per_round": args.rows,
            "microbatch_tokens": args.tokens + 32,
            "lr": 1e-6,
        },
        "checkpoint": {"every": 1, "keep": 1},
        "gates": {"max_truncation_jump": 1.0},
    }
    (place / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return place / "recipe.yaml"


def held(pid):
    """(resident, proportional, anonymous) bytes of a process."""
    sizes = dict.fromkeys(("Rss", "Pss", "Anonymous"), 0)
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]:
            key, value = line.split(":")
            if key in sizes:
                sizes[key] = int(value.split()[0]) * 1024
    return sizes


class Watch(threading.Thread):
    """Peaks of the processes under this one, by the phase that a file names."""

    def __init__(self, place):
        super().__init__(daemon=True)
        self.file, self.peaks, self.seconds, self.over = place / "phase", {}, {}, False

    def run(self):
        before = time.perf_counter()
        while not self.over:
            time.sleep(0.2)
            phase = self.file.read_text() if self.file.exists() else "start"
            own = [held(one.pid) for one in psutil.Process().children(recursive=True)]
            if not own:
                continue
            now = time.perf_counter()
            self.seconds[phase] = self.seconds.get(phase, 0) + now - before
            before = now
            found = {
                "largest process": max(one["Rss"] for one in own),
                "all processes": sum(one["Pss"] for one in own),
                "anonymous": max(one["Anonymous"] for one in own),
            }
            peak = self.peaks.setdefault(phase, dict.fromkeys(found, 0))
            for name, value in found.items():
                peak[name] = max(peak[name], value)


def train(recipe, resume, data, file):
    """`worker.train`, which writes down its phase as it goes."""

    def told(kind, name, phase):
        plain = getattr(kind, name)

        def call(*args, **more):
            before = file.read_text() if file.exists() else "start"
            file.write_text(phase)
            try:
                return plain(*args, **more)
            finally:
                file.write_text(before)

        setattr(kind, name, call)

    plain_phase = Clock.phase

    @contextlib.contextmanager
    def phase(self, name):
        file.write_text(name)
        with plain_phase(self, name):
            yield
        file.write_text("between")

    Clock.phase = phase
    told(Trainer, "__init__", "load")
    told(Saver, "start", "save")
    told(Saver, "finish", "save")
    from iwopd_megatron.records.recorder import Recorder

    told(Recorder, "export", "export")
    worker.train(recipe, resume, data)


def run(place, args):
    """Train in a world of its own, watched; print the table."""
    recipe = load_recipe(write_recipe(place, args), args.overrides)
    (data,) = check_before_start([recipe])
    watch = Watch(place)
    watch.start()
    start = time.perf_counter()
    code = worker.execute(recipe.world, train, (recipe, False, data, place / "phase"))
    watch.over = True
    watch.join()
    seconds = time.perf_counter() - start
    print(f"exit code {code}, {seconds:.0f} s")
    print("| phase | s | largest process, GiB | its anonymous | all processes |")
    print("| --- | --- | --- | --- | --- |")
    for phase, peak in watch.peaks.items():
        print(
            f"| {phase} | {watch.seconds[phase]:.0f} | {peak['largest process'] / GIB:.2f} "
            f"| {peak['anonymous'] / GIB:.2f} | {peak['all processes'] / GIB:.2f} |"
        )
    children = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    print(f"ru_maxrss of the largest child: {children / GIB:.2f} GiB")
    for line in (place / "run/timing.jsonl").read_text().splitlines():
        print(line)
    export = place / "run/hf/model.safetensors"
    rounds = [str(path.name) for path in (place / "run/checkpoints").iterdir()]
    print(f"checkpoints {rounds}, export {export.stat().st_size / GIB:.2f} GiB")


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--recompute", default="none")
    parser.add_argument("--threads", type=int, default=1)  # what a run's processes have
    parser.add_argument("overrides", nargs="*")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    place = Path(tempfile.mkdtemp(prefix="real_shape_"))
    try:
        for seed, name in enumerate(("student", "teacher")):
            in_another_process(write_folder, place / name, args.layers, seed)
        run(place, args)
    finally:
        shutil.rmtree(place)


if __name__ == "__main__":
    sys.exit(main())
