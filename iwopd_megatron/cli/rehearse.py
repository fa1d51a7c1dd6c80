"""`iwopd rehearse`: a recipe's layouts on this machine, at toy size."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Annotated

import typer

from iwopd_megatron.config.load import read_recipe
from iwopd_megatron.errors import RecipeError
from iwopd_megatron.parity.rehearse import BUDGET, Rehearsal, rehearsals, write_model
from iwopd_megatron.runtime.quiet import quiet


def rehearse(
    recipe: Annotated[Path, typer.Argument(help="recipe YAML")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value")] = None,
    processes: Annotated[
        int, typer.Option(min=1, help="at most so many; larger layouts are halved until they fit")
    ] = 8,
) -> None:
    """Run a recipe's layouts at toy size on CPUs and compare them with Hugging Face."""
    if "RANK" in os.environ:
        raise RecipeError("rehearse starts its own processes; run it without torchrun.")
    found = rehearsals(read_recipe(recipe, overrides or []), processes)
    quiet()
    code = 0
    for role, rehearsal in found.items():
        code = max(code, _run(role, rehearsal))
    sys.exit(code)


def _run(role: str, rehearsal: Rehearsal) -> int:
    from iwopd_megatron.cli import worker
    from iwopd_megatron.config.preflight import describe
    from iwopd_megatron.parity import hf_reference, parity
    from iwopd_megatron.runtime.local_world import local_context

    with tempfile.TemporaryDirectory() as folder:
        write_model(Path(folder), rehearsal.config)
        reference = hf_reference.compute_reference(Path(folder), rehearsal.samples())
        queue = local_context().SimpleQueue()
        arguments = (Path(folder), reference, rehearsal.layout, BUDGET, "fp32", queue)
        code = worker.execute(
            rehearsal.processes, worker.check_parity, (*arguments, rehearsal.recompute)
        )
    if code:
        return code
    result = queue.get()
    problems = parity.failures(result, reference, "fp32")
    layout = {"role": role, "layout": describe(rehearsal.layout), "recompute": rehearsal.recompute}
    print(json.dumps(layout | result))
    for problem in problems:
        print(f"error: {role}: {problem}", file=sys.stderr)
    return 1 if problems else 0
