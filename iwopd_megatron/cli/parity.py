"""`iwopd parity | rehearse`: a model's or a recipe's layouts against Hugging Face, right here."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from iwopd_megatron.config.load import read_recipe
from iwopd_megatron.config.models import Layout
from iwopd_megatron.config.preflight import check_layout, describe
from iwopd_megatron.config.stages import layers_of_stages
from iwopd_megatron.errors import RecipeError
from iwopd_megatron.hf.config import read_hf_config
from iwopd_megatron.hf.folder import check_weights
from iwopd_megatron.parity.rehearse import BUDGET, Rehearsal, rehearsals, write_model
from iwopd_megatron.runtime.quiet import quiet

if TYPE_CHECKING:
    from iwopd_megatron.batch.trajectory import Trajectory

Degree = Annotated[int, typer.Option(min=1, max=2**20)]


@dataclass(frozen=True)
class Comparison:
    """A layout of a model folder that a world of `processes` compares with Hugging Face.

    budget: tokens of a micro-batch; dtype: fp32 or bf16.
    """

    folder: Path
    layout: Layout
    processes: int
    budget: int
    dtype: str = "fp32"
    recompute: str = "none"

    def run(self, samples: list[Trajectory]) -> tuple[int, dict[str, float], list[str]]:
        """Return the world's exit code, the largest differences, and those that are too large."""
        from iwopd_megatron.cli import worker
        from iwopd_megatron.parity import hf_reference, parity
        from iwopd_megatron.runtime.local_world import local_context

        reference = hf_reference.compute_reference(self.folder, samples, self.dtype == "bf16")
        queue = local_context().SimpleQueue()
        place = (self.folder, reference, self.layout, self.budget, self.dtype)
        code = worker.execute(self.processes, worker.check_parity, (*place, queue, self.recompute))
        if code:
            return code, {}, []
        result = queue.get()
        return 0, result, parity.failures(result, reference, self.dtype)


def parity(
    folder: Annotated[Path, typer.Argument(help="Hugging Face folder")],
    tp: Degree = 1,
    pp: Degree = 1,
    vpp: Degree = 1,
    ep: Degree = 1,
    etp: Degree = 1,
    cp: Degree = 1,
    pipeline_model_parallel_layout: Annotated[
        str | None, typer.Option(help="layers of every stage, e.g. 'Et*3|tL': uneven pipelines")
    ] = None,
    packed: Annotated[
        bool, typer.Option("--packed", help="several sequences of unequal length a micro-batch")
    ] = False,
    bf16: Annotated[
        bool, typer.Option("--bf16", help="compare a bf16 layout with bf16's own error")
    ] = False,
) -> None:
    """Compare a layout with Hugging Face on every rank: logits, loss, gradients, optimiser step."""
    if "RANK" in os.environ:
        raise RecipeError("parity starts its own processes; run it without torchrun.")
    axes = dict(tp=tp, pp=pp, vpp=vpp, ep=ep, etp=etp, cp=cp)
    layout = Layout(**axes, pipeline_model_parallel_layout=pipeline_model_parallel_layout)
    hf = read_hf_config(folder)
    check_weights(folder, hf)
    check_layout(layout, hf, "parity")
    quiet()
    from iwopd_megatron.parity.hf_reference import make_samples

    lengths, budget = ([24, 16, 32, 20, 28, 12, 24, 32], 96) if packed else ([32] * 8, 32)
    samples = make_samples(hf.vocab_size, lengths, hf.pad_token_id)
    comparison = Comparison(folder, layout, layout.unit, budget, "bf16" if bf16 else "fp32")
    code, result, problems = comparison.run(samples)
    if code == 0:
        print(json.dumps(result))
        for problem in problems:
            print(f"error: {problem}", file=sys.stderr)
        code = 1 if problems else 0
    sys.exit(code)


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
    """Run one role's layout at toy size, print its differences, and return the exit code."""
    layout, recompute = rehearsal.layout, rehearsal.recompute
    with tempfile.TemporaryDirectory() as folder:
        write_model(Path(folder), rehearsal.config)
        comparison = Comparison(
            Path(folder), layout, rehearsal.processes, BUDGET, recompute=recompute
        )
        code, result, problems = comparison.run(rehearsal.samples())
    if code:
        return code
    said: dict[str, Any] = {"role": role, "layout": describe(layout), "recompute": recompute}
    if layout.placement:
        said["stages"] = layers_of_stages(layout, rehearsal.layers)
    print(json.dumps(said | result))
    for problem in problems:
        print(f"error: {role}: {problem}", file=sys.stderr)
    return 1 if problems else 0
