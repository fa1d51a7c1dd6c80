"""`iwopd convert | export | check | prune`: weights to Megatron, back, proved, and made fewer."""

from __future__ import annotations

import json
import re
import sys
import time
from pathlib import Path
from typing import Annotated

import typer

from iwopd_megatron.errors import RecipeError
from iwopd_megatron.files.outputs import check_folder
from iwopd_megatron.runtime.quiet import quiet

Workers = Annotated[int, typer.Option(min=1, help="threads, each with one weight at a time")]
Force = Annotated[bool, typer.Option("--force", help="replace OUT when the new one is complete")]


def convert(
    folder: Annotated[Path, typer.Argument(help="Hugging Face folder")],
    out: Annotated[Path, typer.Argument(help="checkpoint folder to write")],
    names: Annotated[
        str,
        typer.Option(
            help="native; te for models of TransformerEngine modules; bridge for those of "
            "Megatron-Bridge and ms-swift, with what they keep around a checkpoint"
        ),
    ] = "native",
    workers: Workers = 2,
    force: Force = False,
) -> None:
    """Write a Megatron torch_dist checkpoint, which loads in any layout, of a model folder."""
    check_folder(out.parent, "folder of OUT")
    quiet()
    from iwopd_megatron.weights.convert import hf_to_megatron

    start = time.perf_counter()
    result = hf_to_megatron(folder, out, names, workers, force)
    _say(out, result, start)


def export(
    checkpoint: Annotated[
        Path, typer.Argument(help="torch_dist checkpoint of any layout, or a folder of iterations")
    ],
    out: Annotated[Path, typer.Argument(help="Hugging Face folder to write")],
    hf: Annotated[
        Path | None,
        typer.Option(help="folder with config.json and tokenizer, instead of the checkpoint's own"),
    ] = None,
    workers: Workers = 2,
    force: Force = False,
) -> None:
    """Write a Hugging Face folder of a Megatron checkpoint."""
    check_folder(out.parent, "folder of OUT")
    quiet()
    from iwopd_megatron.weights.convert import megatron_to_hf

    start = time.perf_counter()
    result = megatron_to_hf(checkpoint, out, hf, workers, force)
    _say(out, result, start)


def check(
    a: Annotated[Path, typer.Argument(help="Hugging Face folder, or manifest")],
    b: Annotated[Path, typer.Argument(help="what to compare it with")],
    tolerance: Annotated[
        float, typer.Option(min=0, help="largest allowed difference of weights, logits and KL")
    ] = 0.0,
    workers: Workers = 2,
) -> None:
    """Compare two models tensor by tensor, and by their logits if small; exit 1 if they differ."""
    quiet()
    from iwopd_megatron.parity.check import compare, read_side

    result = compare(read_side(a, workers), read_side(b, workers), tolerance)
    print(json.dumps(result.figures))
    for problem in result.problems[:20]:
        print(f"error: {problem}", file=sys.stderr)
    if len(result.problems) > 20:
        print(f"error: and {len(result.problems) - 20} more", file=sys.stderr)
    raise typer.Exit(1 if result.problems else 0)


def prune(
    folder: Annotated[Path, typer.Argument(help="Hugging Face folder")],
    out: Annotated[Path, typer.Argument(help="Hugging Face folder to write")],
    drop: Annotated[
        str, typer.Option(help="numbers of layers from 0 on, and ranges, e.g. 12,14,16-18")
    ],
    force: Force = False,
) -> None:
    """Write a model folder without some of its layers, as a student to be distilled."""
    layers = _layers(drop)
    check_folder(out.parent, "folder of OUT")
    quiet()
    from iwopd_megatron.weights.prune import drop_layers

    start = time.perf_counter()
    result = drop_layers(folder, out, layers, force)
    seconds = time.perf_counter() - start
    print(
        f"wrote {out}: {result.after} of {result.before} layers, {result.tensors} tensors, "
        f"{result.nbytes / 1e9:.3g} GB in {seconds:.1f} s"
    )


def _layers(text: str) -> list[int]:
    """Return the layers that --drop names; RecipeError for what is none, or is there twice."""
    layers: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", part.strip(), re.ASCII)
        if match is None or int(match[2] or match[1]) < int(match[1]):
            raise RecipeError(
                f"--drop {text}: '{part.strip()}' is no layer; write numbers and ranges, e.g. "
                "12,14,16-18."
            )
        layers += range(int(match[1]), int(match[2] or match[1]) + 1)
    twice = sorted(layer for layer in set(layers) if layers.count(layer) > 1)
    if twice:
        raise RecipeError(f"--drop {text} names layer {twice[0]} twice; name it once.")
    return layers


def _say(out: Path, result: dict, start: float) -> None:
    seconds = time.perf_counter() - start
    size = result["bytes"] / 1e9
    kept = f", {result['kept']} of them by an interrupted run" if result["kept"] else ""
    print(f"wrote {out}: {result['tensors']} tensors{kept}, {size:.3g} GB in {seconds:.1f} s")
