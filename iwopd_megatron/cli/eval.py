"""`iwopd eval`: scores of a recipe's model, a run, a checkpoint or a model folder on benchmarks."""

from __future__ import annotations

import contextlib
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from iwopd_megatron.config.data import Source
from iwopd_megatron.config.load import load_recipe, parse_recipe
from iwopd_megatron.config.models import Model
from iwopd_megatron.config.recipe import Recipe
from iwopd_megatron.data.benchmarks import load_benchmark, with_path
from iwopd_megatron.data.prompts import load_tokenizer
from iwopd_megatron.data.run_data import asked
from iwopd_megatron.errors import RecipeError
from iwopd_megatron.evaluation.answering import answering_recipe
from iwopd_megatron.files.outputs import check_folder
from iwopd_megatron.hf.answer_end import check_answer_end
from iwopd_megatron.hf.folder import check_model
from iwopd_megatron.runtime.quiet import quiet

MAX_TOKENS = 16384


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
    with _model(target, overrides or [], hf) as (recipe, folder, identity, default_out):
        own = recipe.data.benchmarks | _files(bench_file or [], recipe.data.benchmarks)
        model = Model(hf=folder, dtype=recipe.student.dtype)
        evaluated = answering_recipe(recipe, model, out or default_out, engine, top_p)
        check_folder(out or default_out, "--out")
        names = list(dict.fromkeys(bench.split(",")))
        limit = max_tokens or recipe.rollout.max_response_tokens
        found = [load_benchmark(name, own) for name in names]
        tokenizer = load_tokenizer(folder)
        for note in check_answer_end(folder, tokenizer):
            print(f"note: {note}", file=sys.stderr)
        benchmarks = asked(evaluated, found, limit, "--max-tokens {}", tokenizer)
        from iwopd_megatron.cli import worker
        from iwopd_megatron.evaluation.run_benchmarks import BenchRun

        run = BenchRun(
            evaluated, benchmarks, identity, out or default_out, samples, limit, temperature,
            top_p, seed,
        )  # fmt: skip
        print(f"model: {identity['model']}; results: {run.out}", flush=True)
        sys.exit(worker.execute(1, worker.evaluate, (run,)))


def _files(pairs: list[str], own: dict[str, Source]) -> dict[str, Source]:
    out = {}
    for pair in pairs:
        name, equals, file = pair.partition("=")
        if not equals or not file:
            raise RecipeError(f"--bench-file '{pair}' is not NAME=FILE.")
        out[name] = with_path(name, Path(file), own)
    return out


@contextlib.contextmanager
def _model(
    target: Path, overrides: list[str], template: Path | None
) -> Iterator[tuple[Recipe, Path, dict[str, Any], Path]]:
    """(recipe, Hugging Face folder, what it was made from, where results go) of any target."""
    if target.is_file():
        recipe = load_recipe(target, overrides)
        is_trained = (recipe.out / "hf" / "config.json").is_file()
        if not is_trained and recipe.student.random_init is not None:
            raise RecipeError(f"{recipe.out} has no trained model, and the student starts random.")
        folder = recipe.out / "hf" if is_trained else recipe.student.hf
        place = recipe.out / "eval" / ("trained" if is_trained else "start")
        yield recipe, folder, _identity(folder), place
    elif (target / "recipe.yaml").is_file():
        recipe = load_recipe(target / "recipe.yaml", overrides)
        if (target / "hf" / "config.json").is_file():
            yield recipe, target / "hf", _identity(target / "hf"), target / "eval" / "trained"
        else:
            found = sorted((target / "checkpoints").glob("round_??????"))
            if not found:
                raise RecipeError(f"{target} has neither hf/ nor a checkpoint; train it first.")
            with _exported(found[-1], template) as folder:
                place = target / "eval" / found[-1].name
                yield recipe, folder, _identity(found[-1]), place
    elif (target / "config.json").is_file():
        recipe = _plain_recipe(target, overrides)
        yield recipe, target, _identity(target), Path("runs/eval") / target.resolve().name
    elif (target / ".metadata").is_file():
        with _exported(target, template) as folder:
            recipe = _plain_recipe(folder, overrides)
            yield recipe, folder, _identity(target), Path("runs/eval") / target.resolve().name
    else:
        raise RecipeError(
            f"{target} is neither a recipe nor a run, a checkpoint or a Hugging Face folder."
        )


@contextlib.contextmanager
def _exported(checkpoint: Path, template: Path | None) -> Iterator[Path]:
    from iwopd_megatron.weights.convert import megatron_to_hf

    with tempfile.TemporaryDirectory(prefix="iwopd-eval-") as folder:
        megatron_to_hf(checkpoint, Path(folder) / "hf", template)
        yield Path(folder) / "hf"


def _plain_recipe(folder: Path, overrides: list[str]) -> Recipe:
    """The defaults around a model folder; overrides as for a recipe."""
    from iwopd_megatron.config.load import apply_override

    room = check_model(folder).context_length
    tree: dict[str, Any] = {
        "out": "runs/eval", "student": {"hf": str(folder)}, "data": {"train": "unused"},
        "rollout": {"max_response_tokens": min(MAX_TOKENS, room)},
    }  # fmt: skip
    for override in overrides:
        apply_override(tree, override)
    return parse_recipe(tree, str(folder))


def _identity(folder: Path) -> dict[str, Any]:
    """A model's place, and the sizes and times of its files."""
    files = sorted(file for file in folder.iterdir() if file.is_file())
    stamps = [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]
    return {"model": str(folder), "files": stamps}
