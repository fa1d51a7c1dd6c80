"""`iwopd report | prefixes`: what runs recorded as one page, and one thing they did not record."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from iwopd_megatron.config.data import Source
from iwopd_megatron.config.load import load_recipe
from iwopd_megatron.config.models import Model
from iwopd_megatron.config.recipe import Recipe
from iwopd_megatron.data.benchmarks import Benchmark
from iwopd_megatron.data.prompts import load_tokenizer
from iwopd_megatron.data.run_data import asked
from iwopd_megatron.data.sources import read_source
from iwopd_megatron.errors import RecipeError
from iwopd_megatron.evaluation.answering import answering_recipe
from iwopd_megatron.files.outputs import check_folder
from iwopd_megatron.hf.answer_end import check_answer_end
from iwopd_megatron.hf.folder import check_model
from iwopd_megatron.runtime.quiet import quiet


def report(
    folders: Annotated[list[Path], typer.Argument(help="run folders, or folders of compared runs")],
    out: Annotated[
        Path | None,
        typer.Option(help="folder of report.html; default: the only one, else runs/report"),
    ] = None,
) -> None:
    """Draw report.html of runs or comparisons, several in one page.

    Its table and what was found are printed too, on stderr; stdout is the page's path.
    """
    from iwopd_megatron.report.data import find_runs
    from iwopd_megatron.report.page import write_report
    from iwopd_megatron.report.summary import summarise
    from iwopd_megatron.report.terminal import print_table

    for folder in folders:
        if not folder.is_dir():
            raise RecipeError(f"{folder} is no folder; give a run folder, a recipe's 'out'.")
    place = out or (folders[0] if len(folders) == 1 else Path("runs/report"))
    check_folder(place, "--out")
    page = write_report(folders, place)
    print_table(summarise(find_runs(folders)), sys.stderr)
    print(page)


def prefixes(
    run: Annotated[Path, typer.Argument(help="run folder, a recipe's 'out'")],
    at: Annotated[
        str, typer.Option(help="shares of the student's answers that are kept")
    ] = "0,0.1,0.2,0.3,0.4,0.5,0.6,0.7,0.8,0.9",
    problems: Annotated[int, typer.Option(min=1, help="first problems of data.eval")] = 64,
    samples: Annotated[int, typer.Option(min=1, help="continuations of each prefix")] = 8,
    trained: Annotated[
        bool, typer.Option("--trained", help="the run's final student; default: its first one")
    ] = False,
    engine: Annotated[
        str | None, typer.Option(help="hf, vllm or sglang; default: the recipe's")
    ] = None,
    processes: Annotated[
        int, typer.Option(min=1, help="with engine hf, each holds a whole model")
    ] = 1,
) -> None:
    """Teacher's and student's chance of a right answer from student prefixes of growing length.

    Servers are started for the student, then for the teacher. RUN/prefixes.json has the figures,
    which 'iwopd report RUN' draws.
    """
    if not (run / "recipe.yaml").is_file():
        raise RecipeError(f"{run} is not a run folder: it has no recipe.yaml.")
    recipe = load_recipe(run / "recipe.yaml")
    _check(recipe, run)
    student = run / "hf" if trained else recipe.student.hf
    if trained and not (student / "config.json").is_file():
        raise RecipeError(f"{run} has no trained student yet; leave out --trained, or finish it.")
    check_model(student)
    check_folder(run, "RUN")
    fractions = _fractions(at)
    writers = _writers(recipe, run, student, engine)
    if processes > 1 and writers[0].rollout.engine != "hf":
        raise RecipeError(
            f"--processes {processes} is for the embedded engine; leave it out, and write "
            "rollout.servers.start in the run's recipe for several servers."
        )
    quiet()
    first = Benchmark("data.eval", read_source(Source(path=recipe.data.eval))[0][:problems])
    limit = recipe.rollout.max_response_tokens
    tokenizer = load_tokenizer(student)
    for note in check_answer_end(student, tokenizer):
        print(f"note: {note}", file=sys.stderr)
    setting = "rollout.max_response_tokens={}"
    (benchmark,) = asked(writers[0], [first], limit, setting, tokenizer)
    from iwopd_megatron.cli import worker
    from iwopd_megatron.evaluation.continuations import PrefixStudy

    study = PrefixStudy(recipe, *writers, fractions, benchmark, samples, run)
    study.shares()
    code = worker.execute(processes, worker.continue_prefixes, (study,))
    if code == 0:
        print(run / "prefixes.json")
    sys.exit(code)


def _check(recipe: Recipe, run: Path) -> None:
    if recipe.data.eval is None:
        raise RecipeError(f"{run}/recipe.yaml has no data.eval; its problems are what is answered.")
    if not recipe.named_teachers:
        raise RecipeError(f"{run}/recipe.yaml has no teacher to continue with.")
    for teacher in recipe.named_teachers.values():
        check_model(teacher.hf)


def _writers(
    recipe: Recipe, run: Path, student: Path, engine: str | None
) -> tuple[Recipe, dict[str, Recipe]]:
    """Student, and teachers by source, as models that write answers.

    On servers of their own: those of given urls hold one model.
    """
    if recipe.rollout.servers.urls:
        servers = recipe.rollout.servers.model_copy(update={"urls": [], "start": 1})
        rollout = recipe.rollout.model_copy(update={"servers": servers})
        recipe = recipe.model_copy(update={"rollout": rollout})

    def writer(hf: Path, dtype: str) -> Recipe:
        return answering_recipe(recipe, Model(hf=hf, dtype=dtype), run / "prefixes", engine)

    named = {"": recipe.teacher} if recipe.teacher is not None else recipe.teachers
    teachers = {source: writer(teacher.hf, teacher.dtype) for source, teacher in named.items()}
    return writer(student, recipe.student.dtype), teachers


def _fractions(text: str) -> list[float]:
    try:
        found = sorted({float(word) for word in text.split(",")})
    except ValueError:
        found = []
    if not found or found[0] < 0 or found[-1] >= 1:
        raise RecipeError(f"--at '{text}' is not a list of shares from 0 to below 1, e.g. 0,0.25.")
    return found
