"""ms-swift's own conversion, by mcore-bridge, on a CPU, in its environment (bridges.py starts it).

Jobs: ["import", HF, OUT] | ["export", HF, CHECKPOINT, OUT].
"""

import json
import os
import sys
from pathlib import Path

import on_cpu


def main(jobs: list[list[str]]) -> None:
    on_cpu.install()
    from swift.megatron import megatron_export_main

    # one process, gloo, any free port
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "0"}
    print("ready", flush=True)
    input()
    for kind, hf, *places in jobs:
        config = json.loads((Path(hf) / "config.json").read_text())
        command = ["--model", hf, "--model_type", config["model_type"], "--template", "qwen3"]
        command += ["--torch_dtype", config["dtype"], "--ddp_backend", "gloo"]
        command += ["--no_save_optim", "true", "--no_save_rng", "true"]
        if kind == "import":
            command += ["--to_mcore", "true", "--output_dir", *places]
        else:
            command += ["--to_hf", "true", "--mcore_model", places[0], "--output_dir", places[1]]
        megatron_export_main(command)
    print("done", flush=True)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
