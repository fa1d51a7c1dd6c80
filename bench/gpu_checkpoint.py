"""On one GPU in bf16: converted checkpoints against Megatron's own, with the modules used there.

With TransformerEngine installed this is what shows that the names written by `--names te` are its
names. Three comparisons a model, each exact: the keys, shapes and objects of a checkpoint that
Megatron saves itself; every parameter loaded from a converted one; the tensors of Megatron's own
checkpoint exported again.
"""

import math
import os
import shutil
import sys
import tempfile
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "4"
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from checkpoint_contents import contents
from gpu_check import ROOT, in_world, print_heading, print_row
from safetensors.torch import load_file, save_file

from iwopd_megatron.config.models import Layout
from iwopd_megatron.hf.config import read_hf_config
from iwopd_megatron.models import layer_specs
from iwopd_megatron.models.gpt import build_model, wrap_precision
from iwopd_megatron.runtime.megatron import dist_checkpointing
from iwopd_megatron.runtime.parallel import initialise, shutdown
from iwopd_megatron.weights.convert import hf_to_megatron, megatron_to_hf
from iwopd_megatron.weights.hf_reader import HfTensors, load_shards
from iwopd_megatron.weights.torch_dist import writer as torch_dist


def write_models(folder: Path) -> list[Path]:
    """The demo's MoE teacher and a dense model with tied embeddings, in bf16."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        tie_word_embeddings=True,
    )
    Qwen3ForCausalLM(config).bfloat16().save_pretrained(folder / "dense")
    (folder / "moe").mkdir()
    source = ROOT / "recipes/demo/teacher"
    shutil.copy(source / "config.json", folder / "moe")
    low = {
        name: tensor.bfloat16() for name, tensor in load_file(source / "model.safetensors").items()
    }
    save_file(low, folder / "moe/model.safetensors", metadata={"format": "pt"})
    return [folder / "moe", folder / "dense"]


def save_and_load(source: Path, converted: Path, own: Path, queue) -> None:
    """Save Megatron's own, then load the converted one: how many parameters differ, of how many."""
    parallel, hf = initialise(Layout()), read_hf_config(source)
    models = [wrap_precision(build_model(hf, parallel, "bf16"))[0] for _ in range(2)]
    expected, got = (model.module for model in models)
    load_shards([expected], HfTensors(source), hf, parallel)
    metadata = torch_dist.METADATA | {"dp_cp_group": parallel.dp_cp.group}
    own.mkdir()
    dist_checkpointing.save({"model0": expected.sharded_state_dict(metadata=metadata)}, str(own))
    if contents(converted) == contents(own):  # what has other names cannot be loaded
        queue.put(_count_different(converted, expected, got, metadata))
    shutdown()


def _count_different(converted, expected, got, metadata) -> tuple[int, int]:
    for parameter in got.parameters():
        parameter.data.fill_(math.nan)
    state = {"model0": got.sharded_state_dict(metadata=metadata)}
    got.load_state_dict(dist_checkpointing.load(state, str(converted))["model0"])
    pairs = list(zip(expected.parameters(), got.parameters(), strict=True))
    return sum(not torch.equal(a, b) for a, b in pairs), len(pairs)


def main() -> int:
    if not torch.cuda.is_available():
        sys.exit("error: this table is of a CUDA GPU; `make test` holds the same on CPUs.")
    names = "te" if layer_specs.has_transformer_engine(torch.bfloat16) else "native"
    return check(names)


def check(names: str) -> int:
    """Prints the table; how many of its cells disagree."""
    print_heading(f"checkpoints, {names} names", "keys and shapes", "loaded", "exported again")
    failed = 0
    with tempfile.TemporaryDirectory() as temporary:
        for source in write_models(Path(temporary)):
            converted, own, back = (
                source.with_name(source.name + s) for s in ("_c", "_own", "_hf")
            )
            hf_to_megatron(source, converted, names, say=lambda _: None)
            loaded = in_world(save_and_load, source, converted, own)
            written, wanted = set(contents(converted).items()), set(contents(own).items())
            differing = [f"missing {name}" for name, _ in sorted(wanted - written, key=str)]
            differing += [f"not wanted {name}" for name, _ in sorted(written - wanted, key=str)]
            megatron_to_hf(own, back, source, say=lambda _: None)
            before, after = (load_file(f / "model.safetensors") for f in (source, back))
            unequal = before.keys() ^ after.keys() or {
                name for name in before if not torch.equal(before[name], after[name])
            }
            cells = (
                "; ".join(differing) or "equal",
                "{} of {} differ".format(*loaded[0]) if loaded else "not tried",
                f"{len(unequal)} of {len(before)} differ",
            )
            print_row(source.name, *cells)
            failed += bool(differing) + (not loaded or loaded[0][0] > 0) + bool(unequal)
    return failed


if __name__ == "__main__":
    sys.exit(min(main(), 1))
