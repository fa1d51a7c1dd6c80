"""Hugging Face folder <-> Megatron `torch_dist` checkpoint, byte for byte, in bounded memory.

One worker (a thread) takes one block at a time: a layer's, an expert's weight. A block moves in
pieces of at most LIMIT bytes from mapped file to planned position, and no dtype is ever cast.
An interrupted conversion goes on where it stopped (continuation.py).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from iwopd_megatron.errors import RecipeError
from iwopd_megatron.files.rawfile import check_free, complete_folder
from iwopd_megatron.hf import companions
from iwopd_megatron.hf.companions import copy_companions, template_of
from iwopd_megatron.hf.config import HfConfig, read_hf_config
from iwopd_megatron.hf.folder import check_weights
from iwopd_megatron.hf.shapes import EMBEDDING, HEAD, hf_shape
from iwopd_megatron.weights import manifest, pieces, safetensors_file, torch_dist
from iwopd_megatron.weights.continuation import Parts, Record, identity, run
from iwopd_megatron.weights.hf_reader import HfTensors
from iwopd_megatron.weights.manifest import DTYPE_NAMES, DTYPES
from iwopd_megatron.weights.pieces import Piece, cut
from iwopd_megatron.weights.safetensors_file import SafetensorsWriter
from iwopd_megatron.weights.table import Block, blocks
from iwopd_megatron.weights.torch_dist import (
    METADATA,
    Slot,
    Writer,
    expected_tensors,
    find_names,
    object_keys,
    stacked_shape,
)
from iwopd_megatron.weights.torch_dist_reader import Reader


def hf_to_megatron(
    source: Path,
    out: Path,
    names: str = "native",
    workers: int = 1,
    force: bool = False,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Write a checkpoint of a Hugging Face folder; RecipeError if it is unfit.

    Returns {"tensors", "bytes", "kept": tensors that an interrupted run had written}.
    """
    if names not in ("native", "te"):
        raise RecipeError(f"names={names} is unknown; write native or te.")
    hf = read_hf_config(source)
    check_weights(source, hf)
    tensors = HfTensors(source, scaled_dtype=getattr(torch, hf.dtype), with_tied_head=True)
    before = manifest.read(source)
    manifest.verify_config(before, hf, source)
    check_free(out, 0, force, (source,))
    all_blocks = list(blocks(hf, names))
    writer, plan = _plan_import(tensors, all_blocks, hf)
    writer.add_objects(object_keys(hf, names))

    def write(block: Block, steps: list[tuple[Piece, Slot]]) -> Parts:
        for piece, slot in steps:
            rows, whole = piece.gather(block, tensors)
            writer.write(slot, whole)
            yield from zip(piece.sources, rows, strict=True)

    def written(block: Block, steps: list[tuple[Piece, Slot]]) -> Parts:
        dtype = DTYPES[tensors[block.hf_names[0]].get_dtype()]
        for piece, slot in steps:
            whole = writer.read(slot).view(dtype).view(piece.last - piece.first, -1)
            yield from zip(piece.sources, piece.scatter(block, whole), strict=True)

    with complete_folder(out, writer.nbytes, force, (source,)) as folder:
        limits = [pieces.LIMIT, torch_dist.FILE_BYTES]
        record = Record(folder, identity(source, names=names, limits=limits), say)
        writer.open(folder)
        found = run(plan, write, written, hf, record, workers)
        if hf.tie_word_embeddings and HEAD in tensors:
            found[HEAD] = found[EMBEDDING]
        manifest.verify_tensors(before, found, source)
        manifest.write(folder, hf, found)
        copy_companions(source, folder / companions.FOLDER)
        writer.finish(METADATA)
    return {"tensors": len(found), "bytes": writer.nbytes, "kept": record.kept}


def _plan_import(
    tensors: HfTensors, all_blocks: list[Block], hf: HfConfig
) -> tuple[Writer, list[tuple[Block, list[tuple[Piece, Slot]]]]]:
    """A slot of the checkpoint for every piece. A global tensor has one dtype."""
    writer, plan = Writer(), []
    dtypes: dict[str, str] = {}
    for block in all_blocks:
        for name in block.hf_names:
            dtype = tensors[name].get_dtype()
            if dtypes.setdefault(block.key, dtype) != dtype:
                raise RecipeError(
                    f"{tensors.folder}: {name} is {dtype}, the same weight of another layer "
                    f"{dtypes[block.key]}; a checkpoint stacks them in one dtype."
                )
        dtype, whole = DTYPES[dtypes[block.key]], stacked_shape(block, hf)
        lead, rest = len(block.place), whole[len(block.place) + 1 :]
        steps = []
        for piece in cut(block, hf, dtype.itemsize):
            offsets = (*block.place, piece.first, *(0 for _ in rest))
            sizes = (*(1 for _ in range(lead)), piece.last - piece.first, *rest)
            steps.append((piece, writer.add(block.key, whole, dtype, offsets, sizes)))
        plan.append((block, steps))
    return writer, plan


def megatron_to_hf(
    source: Path,
    out: Path,
    template: Path | None = None,
    workers: int = 1,
    force: bool = False,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Write a Hugging Face folder of a checkpoint, with the template's configs and tokenizer.

    Without a template, with those that the checkpoint carries (`companions.FOLDER`).
    The checkpoint may come from any layout, with or without optimiser states. Returns what
    `hf_to_megatron` does; RecipeError if it does not fit the template's config.json or its own
    manifest.
    """
    reader, template = Reader(source), template_of(source, template)
    hf = read_hf_config(template)
    before = manifest.read(source)
    manifest.verify_config(before, hf, template)
    check_free(out, 0, force, (source, template))
    names = find_names(reader.tensors)
    _check_shapes(reader, expected_tensors(hf, names))
    all_blocks = list(blocks(hf, names))
    for key, lead in {block.key: len(block.place) for block in all_blocks}.items():
        reader.index(key, lead)
    writer = SafetensorsWriter()
    for block in all_blocks:
        for name in block.hf_names:
            writer.add(name, hf_shape(name, hf), DTYPE_NAMES[reader.dtype(block.key)])
    if hf.tie_word_embeddings and before is not None and HEAD in before["tensors"]:
        writer.add_copy(HEAD, EMBEDDING)
    plan = [(block, list(cut(block, hf, reader.dtype(block.key).itemsize))) for block in all_blocks]

    def write(block: Block, steps: list[Piece]) -> Parts:
        for piece in steps:
            whole = reader.read(block.key, block.place, piece.first, piece.last)
            parts = piece.scatter(block, whole)
            for (name, (row, _)), part in zip(piece.sources.items(), parts, strict=True):
                part = part.contiguous()
                writer.write(name, part, row)
                yield name, part

    def written(block: Block, steps: list[Piece]) -> Parts:
        for piece in steps:
            for name, (first, last) in piece.sources.items():
                rows = writer.read(name, first, last).view(reader.dtype(block.key))
                yield name, rows

    with complete_folder(out, writer.nbytes, force, (source, template)) as folder:
        limits = [pieces.LIMIT, safetensors_file.SHARD_BYTES]
        settings = {"config": manifest.essentials(hf), "copies": writer.copies, "limits": limits}
        record = Record(folder, identity(source, **settings), say)
        writer.open(folder)
        found = run(plan, write, written, hf, record, workers)
        found |= {copy: found[name] for copy, name in writer.copies.items()}
        manifest.verify_tensors(before, found, source)
        manifest.write(folder, hf, found)
        writer.finish()
        copy_companions(template, folder)
    return {"tensors": len(found), "bytes": writer.nbytes, "kept": record.kept}


def _check_shapes(reader: Reader, expected: dict[str, tuple[int, ...]]) -> None:
    """Refuse a checkpoint whose weights are not those the config implies."""
    shapes = reader.shapes()
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
