"""ms-swift's own conversion by mcore-bridge, on a CPU: import HF OUT | export HF CHECKPOINT OUT."""

import json
import os
import sys
from pathlib import Path

from iwopd_megatron.runtime import stand_ins


def main(direction: str, hf: str, *places: str) -> None:
    stand_ins.install()
    from swift.megatron import megatron_export_main

    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost"}
    os.environ["MASTER_PORT"] = "0"  # any free one
    model_type = json.loads((Path(hf) / "config.json").read_text())["model_type"]
    command = ["--model", hf, "--model_type", model_type, "--template", "qwen3"]
    command += ["--ddp_backend", "gloo", "--no_save_optim", "true", "--no_save_rng", "true"]
    if direction == "import":
        command += ["--to_mcore", "true", "--output_dir", *places]
    else:
        command += ["--to_hf", "true", "--mcore_model", places[0], "--output_dir", places[1]]
    megatron_export_main(command)


if __name__ == "__main__":
    main(*sys.argv[1:])
