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

from iwopd_megatron.config.load import apply_override, parse_tree, read_recipe
from iwopd_megatron.config.models import Layout
from iwopd_megatron.config.preflight import check_layout, describe
from iwopd_megatron.config.recipe import Recipe
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
    full: Annotated[
        bool, typer.Option("--full", help="instead at its real size, on tensors without memory")
    ] = False,
    all_layers: Annotated[
        bool, typer.Option("--all-layers", help="with --full: every layer, not two a chunk")
    ] = False,
    short: Annotated[
        bool, typer.Option("--short", help="with --full: fewer layers' slices, no hot experts")
    ] = False,
    into: Annotated[
        list[str] | None,
        typer.Option(help="with --full: a layout that loads its checkpoint, e.g. 'tp: 4, pp: 2'"),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="with --full: one JSON object")] = False,
) -> None:
    """Run a recipe's layouts at toy size on CPUs and compare them with Hugging Face.

    With --full the whole run at its real size, every rank's slices, bytes and collectives.
    """
    if "RANK" in os.environ:
        raise RecipeError("rehearse starts its own processes; run it without torchrun.")
    content = read_recipe(recipe, overrides or [])
    if full:
        layouts = [_layout(text) for text in into or []]
        return _rehearse_full(content, all_layers, short, layouts, as_json)
    for name, given in dict(all_layers=all_layers, short=short, into=into, json=as_json).items():
        if given:
            raise RecipeError(f"--{name.replace('_', '-')} is of the full rehearsal; add --full.")
    found = rehearsals(content, processes)
    quiet()
    code = 0
    for role, rehearsal in found.items():
        code = max(code, _run(role, rehearsal))
    sys.exit(code)


def _layout(text: str) -> Layout:
    """Return the layout of `--into`, written as in a recipe; RecipeError."""
    tree: dict[str, Any] = {}
    apply_override(tree, f"into={text if text.startswith('{') else '{' + text + '}'}")
    if not isinstance(tree["into"], dict):
        raise RecipeError(f"--into: '{text}' is no layout; write e.g. --into 'tp: 4, pp: 2'.")
    return parse_tree(tree["into"], Layout, "--into", is_recipe=False)


def _rehearse_full(
    recipe: Recipe, all_layers: bool, short: bool, into: list[Layout], as_json: bool
) -> None:
    """Rehearse at real size; print what was found; exit with 1 on any finding."""
    quiet()
    from iwopd_megatron.rehearsal import full, table

    found = full.rehearse(recipe, all_layers, short, into)
    if as_json:
        print(json.dumps(found.as_json()))
    else:
        table.show(found)
    sys.exit(1 if found.findings else 0)


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
