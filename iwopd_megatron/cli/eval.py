"""`iwopd eval`: scores of a recipe's model, a run, a checkpoint or a model folder on benchmarks."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from iwopd_megatron.config.data import Source
from iwopd_megatron.config.models import Model
from iwopd_megatron.data.benchmarks import load_benchmark, with_path
from iwopd_megatron.data.prompts import load_tokenizer
from iwopd_megatron.data.run_data import asked
from iwopd_megatron.errors import RecipeError
from iwopd_megatron.evaluation.answering import answering_recipe
from iwopd_megatron.evaluation.target import open_target
from iwopd_megatron.files.outputs import check_folder
from iwopd_megatron.hf.answer_end import check_answer_end
from iwopd_megatron.runtime.quiet import quiet


def evaluate(
    target: Annotated[
        Path, typer.Argument(help="recipe, run folder, Megatron checkpoint or Hugging Face folder")
    ],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value of the recipe")] = None,
    bench: Annotated[
        str, typer.Option(help="aime24,aime25,hmmt25,hmmt25_nov,humaneval+,mbpp+,toy or your own")
    ] = "aime24,aime25,hmmt25",
    engine: Annotated[
        str | None, typer.Option(help="hf, vllm or sglang; default: the recipe's")
    ] = None,
    samples: Annotated[
        int, typer.Option(min=1, help="answers a problem; programs get one, greedy")
    ] = 32,
    max_tokens: Annotated[
        int | None, typer.Option(min=1, help="of an answer; default: the recipe's, or 16384")
    ] = None,
    temperature: Annotated[float, typer.Option(min=0)] = 1.0,
    top_p: Annotated[float, typer.Option(min=0, max=1)] = 1.0,
    seed: Annotated[int, typer.Option(min=0, help="the same for all models that are compared")] = 0,
    bench_file: Annotated[
        list[str] | None, typer.Option(help="NAME=FILE: where a benchmark lies; may be repeated")
    ] = None,
    hf: Annotated[
        Path | None, typer.Option(help="config and tokenizer of a Megatron checkpoint")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="results; a run that was killed goes on from there")
    ] = None,
) -> None:
    """Answer benchmarks and grade the answers: mean@n, best@n, pass@k with intervals."""
    if out is not None:
        check_folder(out, "--out")
    quiet()
    with open_target(target, overrides or [], hf) as found:
        recipe, place = found.recipe, out or found.out
        own = recipe.data.benchmarks | _files(bench_file or [], recipe.data.benchmarks)
        model = Model(hf=found.folder, dtype=recipe.student.dtype)
        answering = answering_recipe(recipe, model, place, engine, top_p)
        check_folder(place, "--out")
        limit = max_tokens or recipe.rollout.max_response_tokens
        loaded = [load_benchmark(name, own) for name in dict.fromkeys(bench.split(","))]
        tokenizer = load_tokenizer(found.folder)
        for note in check_answer_end(found.folder, tokenizer):
            print(f"note: {note}", file=sys.stderr)
        benchmarks = asked(answering, loaded, limit, "--max-tokens {}", tokenizer)
        from iwopd_megatron.cli import worker
        from iwopd_megatron.evaluation.run_benchmarks import BenchRun

        sampling = (samples, limit, temperature, top_p, seed)
        run = BenchRun(answering, benchmarks, found.identity, place, *sampling)
        print(f"model: {found.identity['model']}; results: {run.out}", flush=True)
        sys.exit(worker.execute(1, worker.evaluate, (run,)))


def _files(pairs: list[str], own: dict[str, Source]) -> dict[str, Source]:
    """Return the benchmarks of --bench-file, each at the file that its pair names."""
    out = {}
    for pair in pairs:
        name, equals, file = pair.partition("=")
        if not equals or not file:
            raise RecipeError(f"--bench-file '{pair}' is not NAME=FILE.")
        out[name] = with_path(name, Path(file), own)
    return out
