"""Hugging Face folder <-> Megatron `torch_dist` checkpoint, byte for byte, in bounded memory.

One worker (a thread) takes one block at a time: a layer's, an expert's weight. A block moves in
pieces of at most PIECE_BYTES from mapped file to planned position, and no dtype is ever cast.
An interrupted conversion goes on where it stopped (continuation.py).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch

from iwopd_megatron.errors import RecipeError
from iwopd_megatron.files.iterations import iteration_folder
from iwopd_megatron.files.rawfile import check_free, complete_folder
from iwopd_megatron.hf import companions
from iwopd_megatron.hf.companions import copy_companions, template_of
from iwopd_megatron.hf.config import HfConfig, read_hf_config
from iwopd_megatron.hf.folder import check_weights
from iwopd_megatron.hf.shapes import EMBEDDING, HEAD, hf_shape
from iwopd_megatron.weights import bridge_folder, manifest, pieces, shards
from iwopd_megatron.weights.continuation import ConversionRecord, Rows, convert_blocks, identity
from iwopd_megatron.weights.hf_reader import HfTensors
from iwopd_megatron.weights.manifest import DTYPE_NAMES, DTYPES
from iwopd_megatron.weights.pieces import Piece, cut_block
from iwopd_megatron.weights.safetensors_file import SafetensorsPlan, SafetensorsWriter
from iwopd_megatron.weights.table import WeightBlock, weight_blocks
from iwopd_megatron.weights.torch_dist import writer as checkpoint_writer
from iwopd_megatron.weights.torch_dist.blob import serialise
from iwopd_megatron.weights.torch_dist.objects import object_keys
from iwopd_megatron.weights.torch_dist.reader import CheckpointReader
from iwopd_megatron.weights.torch_dist.writer import (
    METADATA,
    CheckpointPlan,
    CheckpointWriter,
    Slot,
    expected_tensors,
    find_names,
    stacked_shape,
    write_metadata,
)

# Global tensors with a row for every token.
VOCABULARY = {"embedding.word_embeddings.weight", "output_layer.weight"}
Chunks: TypeAlias = list[tuple[Piece, Slot]]  # a block's pieces and their places in a checkpoint


def hf_to_megatron(
    source: Path,
    out: Path,
    names: str = "native",
    workers: int = 1,
    force: bool = False,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Write a checkpoint of a Hugging Face folder; RecipeError if it is unfit.

    names: native or te, whose modules have the weights; bridge, te in the folder that
    Megatron-Bridge and ms-swift load (bridge_folder.py). Returns {"tensors", "bytes", "kept":
    tensors that an interrupted run had written}.
    """
    if names not in ("native", "te", "bridge"):
        raise RecipeError(f"names={names} is unknown; write native, te or bridge.")
    hf, is_bridge = read_hf_config(source), names == "bridge"
    if is_bridge:
        bridge_folder.check_provider(hf, source)
    modules = "te" if is_bridge else names
    weights = check_weights(source, hf)
    tensors = HfTensors(source, getattr(torch, hf.dtype), weights)
    before = manifest.read(source)
    manifest.verify_config(before, hf, source)
    check_free(out, 0, force, (source,))
    plan, blocks = _plan_import(tensors, modules, hf)
    for key in object_keys(hf, modules):
        plan.add_object(key, None)
    with complete_folder(out, plan.nbytes, force, (source,)) as folder:
        limits = [pieces.PIECE_BYTES, checkpoint_writer.FILE_BYTES]
        record = ConversionRecord(folder, identity(source, names=names, limits=limits), say)
        place = folder / bridge_folder.ITERATION if is_bridge else folder
        place.mkdir(exist_ok=True)
        writer = CheckpointWriter(plan, place)
        mover = _ToMegatron(tensors, writer)
        found = convert_blocks(blocks, mover.write, mover.read_back, hf, record, workers)
        if hf.tie_word_embeddings and HEAD in tensors:
            found[HEAD] = found[EMBEDDING]
        manifest.verify_tensors(before, found, source)
        manifest.write(place, hf, found)
        copy_companions(source, place / companions.FOLDER)
        writer.close()
        common: dict[str, Any] = {"content_metadata": METADATA}
        if is_bridge:
            common["args"] = bridge_folder.ARGS
        write_metadata(place, [plan.contents], serialise(common))
        if is_bridge:
            dtype = DTYPES[found[EMBEDDING]["dtype"]]
            bridge_folder.write_around(folder, out, hf, dtype)
    return {"tensors": len(found), "bytes": plan.nbytes, "kept": record.kept}


@dataclass(frozen=True)
class _ToMegatron:
    """Moves blocks from a Hugging Face folder into a checkpoint. Any thread."""

    tensors: HfTensors
    writer: CheckpointWriter

    def write(self, block: WeightBlock, chunks: Chunks) -> Rows:
        """Write a block; yield the rows of its sources."""
        for piece, slot in chunks:
            rows, whole = piece.gather(block, self.tensors)
            self.writer.write(slot, whole)
            yield from zip(piece.sources, rows, strict=True)

    def read_back(self, block: WeightBlock, chunks: Chunks) -> Rows:
        """Yield the rows of a block's sources as the checkpoint holds them."""
        dtype = DTYPES[self.tensors[block.hf_names[0]].get_dtype()]
        for piece, slot in chunks:
            whole = self.writer.read(slot).view(dtype).view(piece.last - piece.first, -1)
            yield from zip(piece.sources, piece.scatter(block, whole), strict=True)


def _plan_import(
    tensors: HfTensors, names: str, hf: HfConfig
) -> tuple[CheckpointPlan, list[tuple[WeightBlock, Chunks]]]:
    """Plan a slot of the checkpoint for every piece. A global tensor has one dtype."""
    plan, planned = CheckpointPlan(), []
    dtypes: dict[str, str] = {}
    for block in weight_blocks(hf, names):
        for name in block.hf_names:
            found = tensors[name].get_dtype()
            if dtypes.setdefault(block.key, found) != found:
                raise RecipeError(
                    f"{tensors.folder}: {name} is {found}, the same weight of another layer "
                    f"{dtypes[block.key]}; a checkpoint stacks them in one dtype."
                )
        dtype, whole = DTYPES[dtypes[block.key]], stacked_shape(block, hf)
        lead, rest = len(block.place), whole[len(block.place) + 1 :]
        chunks = []
        for piece in cut_block(block, hf, dtype.itemsize):
            offsets = (*block.place, piece.first, *(0 for _ in rest))
            sizes = (*(1 for _ in range(lead)), piece.last - piece.first, *rest)
            chunks.append((piece, plan.add(block.key, whole, dtype, offsets, sizes)))
        planned.append((block, chunks))
    return plan, planned


def megatron_to_hf(
    source: Path,
    out: Path,
    template: Path | None = None,
    workers: int = 1,
    force: bool = False,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Write a Hugging Face folder of a checkpoint, with the template's configs and tokenizer.

    Without a template, with those that the checkpoint carries (`companions.FOLDER`). A root of
    iterations is the one that its tracker names.
    The checkpoint may come from any layout, with or without optimiser states. Returns what
    `hf_to_megatron` does; RecipeError if it does not fit the template's config.json or its own
    manifest.
    """
    source = iteration_folder(source)
    reader, template = CheckpointReader(source), template_of(source, template)
    hf = read_hf_config(template)
    before = manifest.read(source)
    manifest.verify_config(before, hf, template)
    check_free(out, 0, force, (source, template))
    names = find_names(reader.tensors)
    _check_shapes(reader, expected_tensors(hf, names), bridge_folder.is_padded(source, hf))
    all_blocks = list(weight_blocks(hf, names))
    for key, lead in {block.key: len(block.place) for block in all_blocks}.items():
        reader.index(key, lead)
    plan, blocks = SafetensorsPlan(), []
    for block in all_blocks:
        dtype = reader.dtype(block.key)
        for name in block.hf_names:
            plan.add(name, hf_shape(name, hf), DTYPE_NAMES[dtype])
        blocks.append((block, list(cut_block(block, hf, dtype.itemsize))))
    if hf.tie_word_embeddings and before is not None and HEAD in before["tensors"]:
        plan.add_copy(HEAD, EMBEDDING)
    with complete_folder(out, plan.nbytes, force, (source, template)) as folder:
        limits = [pieces.PIECE_BYTES, shards.SHARD_BYTES]
        settings = {"config": manifest.essentials(hf), "copies": plan.copies, "limits": limits}
        record = ConversionRecord(folder, identity(source, **settings), say)
        writer = SafetensorsWriter(plan, folder)
        mover = _ToHf(reader, writer)
        found = convert_blocks(blocks, mover.write, mover.read_back, hf, record, workers)
        found |= {copy: found[name] for copy, name in plan.copies.items()}
        manifest.verify_tensors(before, found, source)
        manifest.write(folder, hf, found)
        writer.close()
        copy_companions(template, folder)
    return {"tensors": len(found), "bytes": plan.nbytes, "kept": record.kept}


@dataclass(frozen=True)
class _ToHf:
    """Moves blocks from a checkpoint into a Hugging Face folder. Any thread."""

    reader: CheckpointReader
    writer: SafetensorsWriter

    def write(self, block: WeightBlock, steps: list[Piece]) -> Rows:
        """Write a block's tensors; yield their rows."""
        for piece in steps:
            whole = self.reader.read(block.key, block.place, piece.first, piece.last)
            parts = piece.scatter(block, whole)
            for (name, (row, _)), part in zip(piece.sources.items(), parts, strict=True):
                part = part.contiguous()
                self.writer.write(name, part, row)
                yield name, part

    def read_back(self, block: WeightBlock, steps: list[Piece]) -> Rows:
        """Yield the rows of a block's tensors as the folder holds them."""
        for piece in steps:
            for name, (first, last) in piece.sources.items():
                rows = self.writer.read(name, first, last).view(self.reader.dtype(block.key))
                yield name, rows


def _check_shapes(
    reader: CheckpointReader, expected: dict[str, tuple[int, ...]], is_padded: bool
) -> None:
    """Raise RecipeError if a checkpoint's weights are not those that config.json implies.

    Where the vocabulary is padded, rows beyond config.json's are no weights.
    """
    shapes = reader.shapes()
    if is_padded:
        for key in VOCABULARY & shapes.keys() & expected.keys():
            rows = min(shapes[key][0], expected[key][0])
            shapes[key] = (rows, *shapes[key][1:])
    for key in sorted(shapes.keys() | expected.keys()):
        if key not in shapes:
            raise RecipeError(f"{reader.folder} has no '{key}' although config.json implies it.")
        if key not in expected:
            raise RecipeError(f"{reader.folder} has '{key}', which config.json does not imply.")
        if shapes[key] != expected[key]:
            raise RecipeError(
                f"{reader.folder}: {key} is {shapes[key]}, config.json implies {expected[key]}."
            )
        if reader.dtype(key) not in DTYPE_NAMES:
            raise RecipeError(f"{reader.folder}: {key} is {reader.dtype(key)}, not a plain float.")
