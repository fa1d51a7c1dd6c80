"""Megatron-Bridge's own conversion, on a CPU, in its environment: import HF OUT | export HF CHECKPOINT OUT."""

import sys

from iwopd_megatron.runtime import stand_ins


def main(direction: str, hf: str, *places: str) -> None:
    stand_ins.install()
    from megatron.bridge import AutoBridge
    from megatron.bridge.training.model_load_save import temporary_distributed_context

    if direction == "import":
        with temporary_distributed_context("gloo"):
            AutoBridge.import_ckpt(hf, *places)
    else:
        AutoBridge.from_hf_pretrained(hf).export_ckpt(*places)


if __name__ == "__main__":
    main(*sys.argv[1:])
