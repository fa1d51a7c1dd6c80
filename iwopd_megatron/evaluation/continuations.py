"""How far a teacher can still help: who gets the answer right from a student's prefix (Fig. 1b).

The student answers problems; every answer is cut after a share of its tokens; teacher and student
go on from there, several times each, on the recipe's kind of engine, and the whole answers are
graded. An answer that the recipe's limit would have cut is wrong, as in evaluation.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy
from transformers import AutoTokenizer

from iwopd_megatron.batch.trajectory import Trajectory
from iwopd_megatron.config.recipe import Recipe
from iwopd_megatron.data.benchmarks import Benchmark
from iwopd_megatron.data.problems import Problem
from iwopd_megatron.errors import RecipeError
from iwopd_megatron.evaluation.answering import answering_engine
from iwopd_megatron.evaluation.evaluate import STREAM, grade_samples
from iwopd_megatron.evaluation.pass_at_k import summarise
from iwopd_megatron.files.run_files import write_whole
from iwopd_megatron.grading.pool import count_trouble, describe
from iwopd_megatron.rollout.engine import Prompt, RolloutEngine, Sampling
from iwopd_megatron.runtime.parallel import Parallel

PREFIX_STREAM = STREAM - 1  # random numbers of the answers that are cut; no continuation's
FILE = "prefixes.json"


@dataclass(frozen=True)
class PrefixStudy:
    """The request of one `iwopd prefixes`. recipe: the run's; student, teachers: answering recipes.

    teachers: by the source of their problems, "" for all; fractions: of an answer's tokens;
    benchmark: with its prompts; samples: continuations of each prefix.
    """

    recipe: Recipe
    student: Recipe
    teachers: dict[str, Recipe]
    fractions: list[float]
    benchmark: Benchmark
    samples: int
    out: Path

    @property
    def limit(self) -> int:
        """Tokens of an answer, at most."""
        return self.recipe.rollout.max_response_tokens

    def shares(self) -> list[tuple[str, Recipe, list[int]]]:
        """Return ("teacher", its recipe, places of the problems of its source) for every teacher.

        RecipeError where a problem's source has no teacher.
        """
        problems = self.benchmark.problems
        for problem in problems:
            if not self.teachers.keys() & {"", problem.source}:
                raise RecipeError(
                    f"data.eval: no teacher is for source '{problem.source}' "
                    f"(teachers: {', '.join(self.teachers)})."
                )
        shares = [
            ("teacher", writer, [i for i, p in enumerate(problems) if source in ("", p.source)])
            for source, writer in self.teachers.items()
        ]
        return [share for share in shares if share[2]]


def study_prefixes(study: PrefixStudy, parallel: Parallel, say: Callable[[str], None]) -> None:
    """Write out/prefixes.json: the share of right answers by fraction. Collective.

    say: prints a line for people.
    """
    problems = study.benchmark.problems
    tokenizer = AutoTokenizer.from_pretrained(study.student.student.hf)
    writers = [("student", study.student, list(range(len(problems)))), *study.shares()]
    shape = len(study.fractions), len(problems), study.samples
    grades = {"student": numpy.zeros(shape), "teacher": numpy.zeros(shape)}
    whole: list[Trajectory] = []
    for who, writer, own in writers:  # one at a time is in memory, the student first
        with answering_engine(writer, parallel, say) as engine:
            whole = whole or _answers(engine, study)
            for point, fraction in enumerate(study.fractions):
                prefixes = {i: cut(whole[i], fraction) for i in own}
                found = _continue(engine, study, prefixes, problems, tokenizer, say)
                grades[who][point, own] = found
                say(
                    f"{writer.student.hf.name} from {fraction:.0%} of the student's answers to "
                    f"{len(own)} problems: {found.mean():.3f} right"
                )
    if parallel.is_main:
        _write(study, whole, grades)


def _write(study: PrefixStudy, whole: list[Trajectory], grades: dict[str, numpy.ndarray]) -> None:
    points = [
        {
            "fraction": fraction,
            "tokens": float(numpy.mean([len(cut(x, fraction).response_ids) for x in whole])),
            **{who: summarise(grades[who][point]) for who in grades},
        }
        for point, fraction in enumerate(study.fractions)
    ]
    found = {
        "student": str(study.student.student.hf),
        "teachers": {source: str(writer.student.hf) for source, writer in study.teachers.items()},
        "engine": study.student.rollout.engine,
        "problems": len(whole),
        "samples": study.samples,
        "points": points,
    }
    write_whole(study.out / FILE, json.dumps(found, indent=2) + "\n")


def cut(sample: Trajectory, fraction: float) -> Trajectory:
    """Return the sample with `fraction` of its tokens, rounded down, never with its last one."""
    kept = min(int(fraction * len(sample.response_ids) + 1e-9), len(sample.response_ids) - 1)
    return replace(sample, response_ids=sample.response_ids[:kept], rollout_logp=[])


def joined(prefix: Trajectory, rest: Trajectory) -> Trajectory:
    """Return the sample of a prefix and the response that goes on from it."""
    ids = prefix.response_ids + rest.response_ids
    return replace(prefix, response_ids=ids, truncated=rest.truncated)


def _answers(engine: RolloutEngine, study: PrefixStudy) -> list[Trajectory]:
    """Return the student's whole answers, one a problem."""
    prompts = [Prompt(i, ids) for i, ids in enumerate(study.benchmark.prompts)]
    temperature = study.recipe.evaluate.temperature
    return engine.generate(prompts, Sampling(study.limit, temperature, stream=PREFIX_STREAM))


def _continue(
    engine: RolloutEngine,
    study: PrefixStudy,
    prefixes: dict[int, Trajectory],
    problems: list[Problem],
    tokenizer: Any,
    say: Callable[[str], None],
) -> numpy.ndarray:
    """Return grades `[prefixes, samples]` of answers that go on from these prefixes, by problem."""
    pairs = [(i, prefix) for i, prefix in prefixes.items() for _ in range(study.samples)]
    prompts = [
        Prompt(
            i * study.samples + number % study.samples,
            prefix.prompt_ids + prefix.response_ids,
            given=len(prefix.response_ids),
        )
        for number, (i, prefix) in enumerate(pairs)
    ]
    temperature = study.recipe.evaluate.temperature
    rests = engine.generate(prompts, Sampling(study.limit, temperature, stream=STREAM))
    whole = [joined(prefix, rest) for (_, prefix), rest in zip(pairs, rests, strict=True)]
    grades = grade_samples(whole, [problems[i] for i, _ in pairs], tokenizer)
    if trouble := count_trouble(grades):
        say(describe(trouble))
    return numpy.array([grade.right for grade in grades]).reshape(len(prefixes), study.samples)
