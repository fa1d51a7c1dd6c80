"""Megatron-Bridge's own conversion on a CPU, in its environment (bridges.py starts it).

Jobs: ["import", HF, OUT] | ["export", HF, CHECKPOINT, OUT] | ["fields", HF, CHECKPOINT, FILE].
"""

import dataclasses
import json
import sys
from pathlib import Path

import on_cpu


def main(jobs: list[list[str]]) -> None:
    on_cpu.install()
    from megatron.bridge import AutoBridge
    from megatron.bridge.training.model_load_save import (
        load_model_config,
        temporary_distributed_context,
    )

    print("ready", flush=True)
    input()
    for kind, hf, *places in jobs:
        if kind == "import":
            with temporary_distributed_context("gloo"):
                AutoBridge.import_ckpt(hf, *places)
        elif kind == "export":
            AutoBridge.from_hf_pretrained(hf).export_ckpt(*places)
        else:
            own = AutoBridge.from_hf_pretrained(hf).to_megatron_provider(load_weights=False)
            ours, _ = load_model_config(places[0])
            Path(places[1]).write_text(json.dumps(differing(own, ours)))
    print("done", flush=True)


def differing(own: object, ours: object) -> dict[str, list[str]]:
    """Fields of Bridge's own model provider that one made of our run_config.yaml has otherwise."""
    assert type(own) is type(ours)
    pairs = {f.name: (getattr(own, f.name), getattr(ours, f.name)) for f in dataclasses.fields(own)}
    return {
        name: [str(a), str(b)]
        for name, (a, b) in pairs.items()
        if a != b and not (callable(a) and callable(b) and name.endswith("init_method"))
    }


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
