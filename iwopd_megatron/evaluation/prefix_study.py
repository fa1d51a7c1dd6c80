"""From a run folder to the study that `iwopd prefixes` makes of it; what cannot be is refused."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

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

if TYPE_CHECKING:
    from iwopd_megatron.evaluation.continuations import PrefixStudy


@dataclass(frozen=True)
class StudyRequest:
    """What the command line asks of a run folder.

    at: shares of the answers that are kept, e.g. 0,0.25; problems: first ones of data.eval;
    samples: continuations of each prefix; is_trained: the final student, not the first; engine:
    None for the recipe's; processes: of the embedded engine.
    """

    run: Path
    at: str
    problems: int
    samples: int
    is_trained: bool
    engine: str | None
    processes: int


def prepare_study(request: StudyRequest) -> tuple[PrefixStudy, list[str]]:
    """Return the study, and notes on its student's ends of answers.

    RecipeError where the run folder, its models or the request do not allow it.
    """
    run = request.run
    recipe, data = _run_recipe(run)
    student = run / "hf" if request.is_trained else recipe.student.hf
    if request.is_trained and not (student / "config.json").is_file():
        raise RecipeError(f"{run} has no trained student yet; leave out --trained, or finish it.")
    check_model(student)
    check_folder(run, "RUN")
    fractions = _fractions(request.at)
    writer, teachers = _writers(recipe, run, student, request.engine)
    if request.processes > 1 and writer.rollout.engine != "hf":
        raise RecipeError(
            f"--processes {request.processes} is for the embedded engine; leave it out, and write "
            "rollout.servers.start in the run's recipe for several servers."
        )
    quiet()
    first = Benchmark("data.eval", read_source(Source(path=data))[0][: request.problems])
    limit = recipe.rollout.max_response_tokens
    tokenizer = load_tokenizer(student)
    notes = check_answer_end(student, tokenizer)
    setting = "rollout.max_response_tokens={}"
    (benchmark,) = asked(writer, [first], limit, setting, tokenizer)
    from iwopd_megatron.evaluation.continuations import PrefixStudy

    study = PrefixStudy(recipe, writer, teachers, fractions, benchmark, request.samples, run)
    study.shares()
    return study, notes


def _run_recipe(run: Path) -> tuple[Recipe, Path]:
    """Return a run folder's recipe and its data.eval, checked for what a study needs."""
    if not (run / "recipe.yaml").is_file():
        raise RecipeError(f"{run} is not a run folder: it has no recipe.yaml.")
    recipe = load_recipe(run / "recipe.yaml")
    if recipe.data.eval is None:
        raise RecipeError(f"{run}/recipe.yaml has no data.eval; its problems are what is answered.")
    if not recipe.named_teachers:
        raise RecipeError(f"{run}/recipe.yaml has no teacher to continue with.")
    for teacher in recipe.named_teachers.values():
        check_model(teacher.hf)
    return recipe, recipe.data.eval


def _writers(
    recipe: Recipe, run: Path, student: Path, engine: str | None
) -> tuple[Recipe, dict[str, Recipe]]:
    """Return student, and teachers by source, as models that write answers.

    They have servers of their own, for those of given urls hold one model.
    """
    if recipe.rollout.servers.urls:
        servers = recipe.rollout.servers.model_copy(update={"urls": [], "start": 1})
        rollout = recipe.rollout.model_copy(update={"servers": servers})
        recipe = recipe.model_copy(update={"rollout": rollout})

    def writer(model: Model) -> Recipe:
        return answering_recipe(recipe, model, run / "prefixes", engine)

    named = {"": recipe.teacher} if recipe.teacher is not None else recipe.teachers
    teachers = {source: writer(teacher) for source, teacher in named.items()}
    return writer(Model(hf=student, dtype=recipe.student.dtype)), teachers


def _fractions(text: str) -> list[float]:
    """Return the shares that --at lists, sorted."""
    try:
        found = sorted({float(word) for word in text.split(",")})
    except ValueError:
        found = []
    if not found or found[0] < 0 or found[-1] >= 1:
        raise RecipeError(f"--at '{text}' is not a list of shares from 0 to below 1, e.g. 0,0.25.")
    return found
