"""Hugging Face folder <-> Megatron `torch_dist` checkpoint, byte for byte, in bounded memory.

One worker (a thread) takes one block at a time: a layer's, an expert's weight. A block moves in
pieces of at most LIMIT bytes from mapped file to planned position, and no dtype is ever cast.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from iwopd_megatron import manifest
from iwopd_megatron.errors import RecipeError
from iwopd_megatron.hf_io import HfTensors
from iwopd_megatron.manifest import DTYPE_NAMES, DTYPES, Digest, entry
from iwopd_megatron.mapping import Block, blocks, hf_shape
from iwopd_megatron.pieces import Piece, pieces
from iwopd_megatron.preflight import read_hf_config
from iwopd_megatron.rawfile import check_free, complete_folder
from iwopd_megatron.safetensors_file import SafetensorsWriter
from iwopd_megatron.torch_dist import (
    METADATA,
    Slot,
    Writer,
    expected_tensors,
    find_names,
    object_keys,
    stacked_shape,
)
from iwopd_megatron.torch_dist_reader import Reader

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
Tensors = dict[str, dict[str, Any]]  # manifest entries by Hugging Face name


def hf_to_megatron(
    source: Path, out: Path, names: str = "native", workers: int = 1, force: bool = False
) -> dict[str, Any]:
    """Write a checkpoint of a Hugging Face folder; {"tensors", "bytes"}. RecipeError if unfit."""
    if names not in ("native", "te"):
        raise RecipeError(f"names={names} is unknown; write native or te.")
    hf, tensors = read_hf_config(source), HfTensors(source)
    before = manifest.read(source)
    manifest.verify_config(before, hf, source)
    check_free(out, 0, force, (source,))
    all_blocks = list(blocks(hf, names))
    is_twice = _check_names(tensors, all_blocks, hf)
    writer, plan = _plan_import(tensors, all_blocks, hf)
    writer.add_objects(object_keys(hf, names))
    with complete_folder(out, writer.nbytes, force, (source,)) as folder:
        writer.open(folder)

        def work(item: tuple[Block, list[tuple[Piece, Slot]]]) -> Tensors:
            block, steps = item
            digests = {name: Digest() for name in block.hf_names}
            for piece, slot in steps:
                rows, whole = piece.gather(block, tensors)
                for name, part in zip(piece.sources, rows, strict=True):
                    digests[name].update(part)
                writer.write(slot, whole)
            return {
                name: entry(hf_shape(name, hf), tensors[name].get_dtype(), digest.hex())
                for name, digest in digests.items()
            }

        found = _run(work, plan, workers)
        if is_twice:
            found[HEAD] = _same_head(tensors, found[EMBEDDING], source)
        manifest.verify_tensors(before, found, source)
        manifest.write(folder, hf, found)
        writer.finish(METADATA)
    return {"tensors": len(found), "bytes": writer.nbytes}


def _run(work: Callable[[Any], Tensors], plan: list, workers: int) -> Tensors:
    """All entries, in the plan's order; the first failure stops the rest."""
    found: Tensors = {}
    with ThreadPoolExecutor(max(1, workers)) as pool:
        futures = [pool.submit(work, item) for item in plan]
        try:
            for future in futures:
                found |= future.result()
        finally:
            pool.shutdown(cancel_futures=True)
    return found


def _check_names(tensors: HfTensors, all_blocks: list[Block], hf: dict[str, Any]) -> bool:
    """Refuse missing and extra tensors; True if a tied model stores its head as well."""
    wanted = {name for block in all_blocks for name in block.hf_names}
    is_twice = bool(hf.get("tie_word_embeddings")) and HEAD in tensors
    extra = sorted(set(tensors) - wanted - ({HEAD} if is_twice else set()))
    if extra:
        raise RecipeError(
            f"{tensors.folder} has the tensor '{extra[0]}', which its config.json does not imply."
        )
    for name in sorted(wanted | ({HEAD} if is_twice else set())):
        shape, dtype = tuple(tensors[name].get_shape()), tensors[name].get_dtype()
        if shape != hf_shape(name, hf):
            raise RecipeError(
                f"{tensors.folder}: {name} is {shape}, config.json implies {hf_shape(name, hf)}."
            )
        if dtype not in DTYPES:
            raise RecipeError(
                f"{tensors.folder}: {name} is {dtype}; only {', '.join(DTYPES)} can be converted."
            )
    return is_twice


def _plan_import(
    tensors: HfTensors, all_blocks: list[Block], hf: dict[str, Any]
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
        for piece in pieces(block, hf, dtype.itemsize):
            offsets = (*block.place, piece.first, *(0 for _ in rest))
            sizes = (*(1 for _ in range(lead)), piece.last - piece.first, *rest)
            steps.append((piece, writer.add(block.key, whole, dtype, offsets, sizes)))
        plan.append((block, steps))
    return writer, plan


def _same_head(tensors: HfTensors, embedding: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The entry of a tied model's stored head, which must be its embedding."""
    digest = Digest()
    digest.update(tensors[HEAD][:])
    head = entry(embedding["shape"], tensors[HEAD].get_dtype(), digest.hex())
    if head != embedding:
        raise RecipeError(
            f"{folder}: {HEAD} differs from {EMBEDDING} although config.json ties them; "
            "write tie_word_embeddings=false there, or remove it."
        )
    return head


def megatron_to_hf(
    source: Path, out: Path, template: Path, workers: int = 1, force: bool = False
) -> dict[str, Any]:
    """Write a Hugging Face folder of a checkpoint, with the template's configs and tokenizer.

    The checkpoint may come from any layout, with or without optimiser states. Returns {"tensors",
    "bytes"}; RecipeError if it does not fit the template's config.json or its own manifest.
    """
    hf, reader = read_hf_config(template), Reader(source)
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
    if hf.get("tie_word_embeddings") and before is not None and HEAD in before["tensors"]:
        writer.add_copy(HEAD, EMBEDDING)
    with complete_folder(out, writer.nbytes, force, (source, template)) as folder:
        writer.open(folder)

        def work(block: Block) -> Tensors:
            digests = {name: Digest() for name in block.hf_names}
            dtype = reader.dtype(block.key)
            for piece in pieces(block, hf, dtype.itemsize):
                whole = reader.read(block.key, block.place, piece.first, piece.last)
                parts = piece.scatter(block, whole)
                for (name, (row, _)), part in zip(piece.sources.items(), parts, strict=True):
                    part = part.contiguous()
                    digests[name].update(part)
                    writer.write(name, part, row)
            return {
                name: entry(hf_shape(name, hf), DTYPE_NAMES[dtype], digest.hex())
                for name, digest in digests.items()
            }

        found = _run(work, all_blocks, workers)
        found |= {copy: found[name] for copy, name in writer.copies.items()}
        manifest.verify_tensors(before, found, source)
        manifest.write(folder, hf, found)
        writer.finish()
        copy_companions(template, folder)
    return {"tensors": len(found), "bytes": writer.nbytes}


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


def copy_companions(template: Path, folder: Path) -> None:
    """Copy config, generation config, tokenizer and chat templates: all that is no weight."""
    weights = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".index.json")
    for file in template.rglob("*"):
        place = file.relative_to(template)
        is_hidden = any(part.startswith(".") for part in place.parts)
        if file.is_file() and not is_hidden and not file.name.endswith((*weights, manifest.NAME)):
            (folder / place).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(file, folder / place)
