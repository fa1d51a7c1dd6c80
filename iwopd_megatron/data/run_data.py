"""All problems of a run, read, checked and encoded: what it trains on and is evaluated on.

Whoever starts a run loads this first and hands it to the world, which so starts with good data, and
reads and encodes nothing twice.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from iwopd_megatron.config import doctor
from iwopd_megatron.config.data import Source
from iwopd_megatron.config.recipe import Recipe
from iwopd_megatron.data.benchmarks import Benchmark, is_on_hub, load_benchmark
from iwopd_megatron.data.problems import Problem
from iwopd_megatron.data.prompts import evaluation_prompts, load_tokenizer
from iwopd_megatron.data.sources import check_sources, read_source, resolve
from iwopd_megatron.data.training_set import TrainingSet, encode_rows, read_training_rows
from iwopd_megatron.errors import GateError, RecipeError
from iwopd_megatron.grading.graders import check_graders
from iwopd_megatron.hf.agreement import same_chat_template, same_vocabulary
from iwopd_megatron.hf.answer_end import check_answer_end, check_ids, end_id, response_ids
from iwopd_megatron.hf.config import read_hf_config


@dataclass(frozen=True)
class RunData:
    """What a run trains on and is evaluated on, encoded.

    main: the first problems of data.eval; named: evaluate.benchmarks, by name; notes: sentences on
    what was left out or may be meant otherwise.
    """

    training: TrainingSet
    main: Benchmark | None
    named: dict[str, Benchmark]
    notes: list[str]


def load_run_data(recipe: Recipe, tokenizer: Any = None) -> RunData:
    """Read, check and encode all of a recipe's problems; start and write nothing.

    RecipeError for the first thing that is wrong in the files. tokenizer: the student's, if loaded.
    """
    rows = read_training_rows(recipe)
    check_problems(recipe, rows.problems)
    main, named = read_evaluation(recipe)
    tokenizer = tokenizer or load_tokenizer(recipe.student.hf)  # slow to import, so after all that
    check_tokenizers(recipe, tokenizer)
    ends = check_answer_end(recipe.student.hf, tokenizer, is_taught=not recipe.is_distilling)
    training = encode_rows(recipe, rows, tokenizer)
    notes = ends + check_training(recipe, training, tokenizer)
    return RunData(training, *encode_evaluation(recipe, main, named, tokenizer), notes)


def check_tokenizers(recipe: Recipe, tokenizer: Any) -> None:
    """Refuse models that give ids another meaning than the student, or prompts another form."""
    student = recipe.student.hf
    try:
        for teacher in recipe.named_teachers.values():
            theirs = load_tokenizer(teacher.hf)
            same_vocabulary(student, teacher.hf, tokenizer, theirs)
            if recipe.gates.same_chat_template:
                same_chat_template(student, teacher.hf, tokenizer, theirs)
        if recipe.base_model is not None:
            theirs = load_tokenizer(recipe.base_model.hf)
            same_vocabulary(student, recipe.base_model.hf, tokenizer, theirs)
    except GateError as error:  # nothing has begun: the recipe is wrong, not the run
        raise RecipeError(str(error)) from None


def load_all(recipes: list[Recipe]) -> list[RunData]:
    """Return the data of each recipe; those that ask the same problems in the same way share it."""
    found: dict[str, RunData] = {}
    out = []
    for recipe in recipes:
        tree = recipe.model_dump(mode="json")
        parts = ("student", "teacher", "teachers", "base", "data", "rollout", "evaluate", "gates")
        key = json.dumps([tree[part] for part in parts])
        found[key] = found.get(key) or load_run_data(recipe)
        out.append(found[key])
    return out


def check_training(recipe: Recipe, training: TrainingSet, tokenizer: Any) -> list[str]:
    """Refuse sources of which nothing is left, and responses that cannot be trained on.

    Returns notes on what is left out of other sources.
    """
    limit = recipe.rollout.max_prompt_tokens
    training.check(limit)
    if not recipe.is_distilling:
        check_responses(recipe, training, tokenizer)
    total = training.too_long + len(training.problems)
    return training.notes + doctor.long_prompts(training.too_long, total, limit)


def check_responses(recipe: Recipe, training: TrainingSet, tokenizer: Any) -> None:
    """Refuse responses with ids beyond the vocabulary, or longer than what trains on them."""
    hf, end = read_hf_config(recipe.student.hf), end_id(recipe.student.hf, tokenizer)
    fits = min(hf.context_length, recipe.train.microbatch_tokens or hf.context_length)
    for problem, ids in training.problems:
        response = response_ids(problem.target, end, tokenizer)
        check_ids(response, hf.vocab_size, f"{problem.place}: the response", tokenizer)
        if len(ids) + len(response) > fits + 1:
            raise RecipeError(
                f"{problem.place}: prompt and response have {len(ids) + len(response)} tokens, and "
                f"at most {fits + 1} can be trained on (train.microbatch_tokens and the model's "
                "context); raise train.microbatch_tokens, or take the row out."
            )


def check_problems(recipe: Recipe, problems: list[Problem]) -> None:
    """Refuse problems that no teacher scores or no grader grades; RecipeError."""
    check_sources(recipe, {problem.source for problem in problems})
    if recipe.is_distilling:
        check_gradable(problems)


def check_gradable(problems: list[Problem]) -> None:
    """Refuse problems whose grader there is not; RecipeError names the first."""
    check_graders({problem.grader: problem.place for problem in reversed(problems)})


def check_rows(recipe: Recipe) -> list[str]:
    """Check all rows on this machine, without a tokenizer; return the titles of hub datasets."""
    sources = [resolve(source) for source in recipe.data.train]
    problems = []
    for source in sources:
        if source.path is not None:
            problems += read_source(source, not recipe.is_distilling)[0]
    check_problems(recipe, problems)
    own = recipe.data.benchmarks
    remote = [name for name in recipe.evaluate.benchmarks if is_on_hub(name, own)]
    names = [name for name in recipe.evaluate.benchmarks if name not in remote]
    evaluate = recipe.evaluate.model_copy(update={"benchmarks": names})
    read_evaluation(recipe.model_copy(update={"evaluate": evaluate}))
    return [source.title for source in sources if source.path is None] + remote


def read_evaluation(recipe: Recipe) -> tuple[Benchmark | None, dict[str, Benchmark]]:
    """Return the benchmarks of data.eval and evaluate.benchmarks (by name), not encoded."""
    main = None
    if recipe.data.eval is not None:
        problems = read_source(Source(path=recipe.data.eval))[0]
        main = Benchmark("data.eval", problems[: recipe.evaluate.problems])
    own = recipe.data.benchmarks
    named = {name: load_benchmark(name, own) for name in dict.fromkeys(recipe.evaluate.benchmarks)}
    for benchmark in named.values() if main is None else [main, *named.values()]:
        check_gradable(benchmark.problems)
    return main, named


def encode_evaluation(
    recipe: Recipe, main: Benchmark | None, named: dict[str, Benchmark], tokenizer: Any
) -> tuple[Benchmark | None, dict[str, Benchmark]]:
    """Return the benchmarks with their prompts, which must leave room for an answer."""
    found = asked(
        recipe,
        ([main] if main else []) + list(named.values()),
        recipe.rollout.max_response_tokens,
        "rollout.max_response_tokens={}",
        tokenizer,
    )
    return (found.pop(0) if main else None), dict(zip(named, found, strict=True))


def asked(
    recipe: Recipe, benchmarks: list[Benchmark], limit: int, setting: str, tokenizer: Any = None
) -> list[Benchmark]:
    """Return benchmarks with the prompts of the recipe's student; RecipeError for an unfit problem.

    limit: tokens of an answer, for which there must be room; setting: how it is written, "key={}".
    """
    if not benchmarks:
        return []
    prompts = evaluation_prompts(recipe, tokenizer or load_tokenizer(recipe.student.hf))
    found = []
    for benchmark in benchmarks:
        check_gradable(benchmark.problems)
        found.append(benchmark.asked(prompts))
        check_room(recipe, found[-1], limit, setting)
    return found


def check_room(recipe: Recipe, benchmark: Benchmark, limit: int, setting: str) -> None:
    """Refuse prompts after which an answer of `limit` tokens does not fit; RecipeError.

    setting: how the limit is written, "key={}".
    """
    rollout, longest = recipe.rollout, max(map(len, benchmark.prompts))
    room = read_hf_config(recipe.student.hf).context_length
    if longest + limit > room:
        raise RecipeError(
            f"the longest prompt of {benchmark.name} ({longest} tokens) and "
            f"{setting.format(limit)} exceed the model's context of {room} tokens; "
            f"write {setting.format(max(room - longest, 1))}."
        )
    served = rollout.max_prompt_tokens + rollout.max_response_tokens
    if rollout.engine != "hf" and not rollout.servers.urls and longest + limit > served:
        raise RecipeError(
            f"the longest prompt of {benchmark.name} ({longest} tokens) and "
            f"{setting.format(limit)} exceed what the rollout servers are started for, "
            f"rollout.max_prompt_tokens + max_response_tokens = {served}; "
            f"write rollout.max_prompt_tokens={longest + limit - rollout.max_response_tokens}."
        )
