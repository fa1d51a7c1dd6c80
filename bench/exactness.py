"""Conversion: is every byte there again, and is a wrong conversion noticed? Tiny random models.

Round trips: tensors of random bits, NaNs with payloads too, so that a cast or any arithmetic would
show. Damages: what faulty converters make of a folder, and what `iwopd check` says; its logits and
KL are on a fixed batch, by transformers.
"""

import itertools
import json
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

import damage
import torch
from conftest import EXPERTS, SHAPE

from iwopd_megatron.files import rawfile
from iwopd_megatron.parity.check import compare, read_side
from iwopd_megatron.parity.rehearse import write_model
from iwopd_megatron.weights.convert import hf_to_megatron, megatron_to_hf

MODELS = {
    "MoE": EXPERTS | {"norm_topk_prob": True},
    "dense": {"tie_word_embeddings": False},
    "dense, tied": {"tie_word_embeddings": True},
}
DAMAGES = {
    "QKV left in Megatron's order": damage.unpermuted,
    "gate and up swapped in one expert": damage.swapped_gate,
    "two experts exchanged": damage.exchanged_experts,
    "16 rows of padding left in the vocabulary": damage.padded_vocabulary,
    "rms_norm_eps 1e-5 for 1e-6": damage.other_epsilon,
    "one bit": damage.one_bit,
    "a tensor lost": damage.lost_norm,
}


def round_trips(folder: Path) -> int:
    """Prints the table; how many tensors came back otherwise."""
    print("| model | dtype | tensors | bytes | names | files of the source | not identical |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    wrong = 0
    for model, dtype in itertools.product(MODELS, (torch.bfloat16, torch.float32)):
        tensors = damage.random_bits(damage.on_disk(folder / model), dtype)
        place = folder / f"{model}_{dtype.itemsize}"
        counts = [
            _round_trip(tensors, folder / model, Path(f"{place}_{names}_{files}"), names, files)
            for names, files in itertools.product(("native", "te"), (1, 5))
        ]
        size, kind = sum(x.nbytes for x in tensors.values()), str(dtype).removeprefix("torch.")
        found = ", ".join(map(str, counts))
        print(f"| {model} | {kind} | {len(tensors)} | {size:,} | native, te | 1, 5 | {found} |")
        wrong += sum(counts)
    return wrong


def _round_trip(tensors: dict, template: Path, place: Path, names: str, files: int) -> int:
    """How many tensors are not what they were."""
    source = damage.write_folder(place, template, tensors, files)
    checkpoint, back = (place.with_name(place.name + end) for end in ("_m", "_b"))
    hf_to_megatron(source, checkpoint, names, say=lambda _: None)
    megatron_to_hf(checkpoint, back, source, say=lambda _: None)
    found = damage.on_disk(back)
    both = found.keys() & tensors.keys()
    other = {name for name in both if not _is_same(found[name], tensors[name])}
    return len(other | (found.keys() ^ tensors.keys()))


def _is_same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and rawfile.raw(a) == rawfile.raw(b)


def damages(folder: Path) -> int:
    """Prints the table; how many damages were not noticed."""
    print("\n| damage | tensors that differ | logits | KL | the first thing it says |")
    print("| --- | --- | --- | --- | --- |")
    missed = 0
    for number, (name, make) in enumerate(DAMAGES.items()):
        tensors = damage.on_disk(folder / "MoE")
        config = json.loads((folder / "MoE/config.json").read_text())
        make(tensors, config)
        other = damage.write_folder(folder / f"damaged_{number}", folder / "MoE", tensors)
        (other / "config.json").write_text(json.dumps(config))
        result = compare(read_side(folder / "MoE"), read_side(other))
        figures = result.figures
        shown = [f"{figures[key]:.2g}" if key in figures else "" for key in ("logits", "kl")]
        said = result.problems[0].replace(f"{folder}/", "") if result.problems else "NOTHING"
        print(f"| {name} | {figures['different']} | {shown[0]} | {shown[1]} | {said} |")
        missed += not result.problems
    return missed


def main() -> int:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for name, settings in MODELS.items():
            write_model(folder / name, SHAPE | settings)
        return round_trips(folder) + damages(folder)


if __name__ == "__main__":
    sys.exit(min(main(), 1))
