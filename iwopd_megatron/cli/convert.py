"""`iwopd convert | export | check`: weights between Hugging Face and Megatron, and the proof."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Annotated

import typer

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


def _say(out: Path, result: dict, start: float) -> None:
    seconds = time.perf_counter() - start
    size = result["bytes"] / 1e9
    kept = f", {result['kept']} of them by an interrupted run" if result["kept"] else ""
    print(f"wrote {out}: {result['tensors']} tensors{kept}, {size:.3g} GB in {seconds:.1f} s")
