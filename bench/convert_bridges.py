"""Hugging Face folder to saved checkpoint: Megatron-Bridge and ms-swift against ours.

python bench/convert_bridges.py [FOLDER [SIZE ...]]: models of 1 and 4 GB as in convert.py, random
bf16. All three write the same checkpoint, TransformerEngine's names, on a CPU, one process and one
compute thread each (ours two writing threads), the model in the page cache. One run. Seconds
begin after all imports and end when the checkpoint is saved and flushed. Memory is the peak of
anonymous memory (Pss_Anon of the process and its children, so shared pages count once) above that
after the imports. The two bridges are their own programs (tests/with_bridge), in their environment.
"""

import json
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import psutil
from convert import MODELS, WORKERS, write_model

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests/with_bridge"))
from bridges import PROGRAMS, start

OURS = "import sys; from pathlib import Path; from iwopd_megatron.weights.convert import *\n" + (
    "print('ready', flush=True); input()\n"
    f"hf_to_megatron(Path(sys.argv[1]), Path(sys.argv[2]), 'bridge', {WORKERS})\n"
    "print('done', flush=True)"
)


def anonymous(pid: int) -> int:
    """Bytes of anonymous memory of a process and its children."""
    total = 0
    for process in [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]:
        try:
            lines = Path(f"/proc/{process.pid}/smaps_rollup").read_text().splitlines()
        except OSError:  # it has ended
            continue
        total += sum(1024 * int(x.split()[1]) for x in lines if x.startswith("Pss_Anon"))
    return total


def begin(name: str, hf: Path, out: Path) -> subprocess.Popen:
    if name in PROGRAMS:
        return start(name, [["import", hf, out]])
    pipe = subprocess.PIPE
    command = [sys.executable, "-W", "ignore", "-c", OURS, str(hf), str(out)]
    child = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True)
    child.stdout.readline()
    return child


def measure(name: str, hf: Path, out: Path) -> tuple[float, float]:
    """Seconds and peak MB of one conversion."""
    child = begin(name, hf, out)
    done, said = threading.Event(), []

    def listen() -> None:
        for line in child.stdout:
            said.append(line)
            if line == "done\n":
                break
        done.set()

    listener = threading.Thread(target=listen)
    at_rest, peak = anonymous(child.pid), 0
    listener.start()
    began = time.perf_counter()
    child.stdin.write("\n")
    child.stdin.flush()
    while not done.wait(0.02):
        peak = max(peak, anonymous(child.pid))
    seconds = time.perf_counter() - began
    listener.join()
    child.communicate()
    if child.returncode:
        sys.exit("".join(said[-30:]))
    return seconds, (peak - at_rest) / 1e6


def complete(folder: Path) -> None:
    """What the bridges also ask of a model folder: its class, dtype and a tokenizer."""
    file = folder / "config.json"
    more = {"architectures": ["Qwen3MoeForCausalLM"], "dtype": "bfloat16"}
    file.write_text(json.dumps(json.loads(file.read_text()) | more))
    for tokenizer in (ROOT / "recipes/demo/student").glob("tokenizer*"):
        shutil.copy(tokenizer, folder)


def main() -> None:
    place, *sizes = sys.argv[1:] or [None]
    print("| model GB | program | seconds | peak MB | ours is faster by | ours / its memory |")
    print("| --- " * 6 + "|", flush=True)
    for size in sizes or ["1", "4"]:
        with tempfile.TemporaryDirectory(dir=place) as folder:
            hf, out = Path(folder) / "hf", Path(folder) / "out"
            nbytes = write_model(hf, *MODELS[size])
            complete(hf)
            ours = measure("ours", hf, out)
            for name in ("ours", *PROGRAMS):
                if name != "ours":
                    shutil.rmtree(out)
                seconds, mb = ours if name == "ours" else measure(name, hf, out)
                cells = [f"{nbytes / 1e9:.2f}", name, f"{seconds:.1f}", f"{mb:.0f}"]
                cells += [f"{seconds / ours[0]:.1f}", f"{ours[1] / mb:.3f}"]
                print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
