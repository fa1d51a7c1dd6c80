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

from iwopd_megatron.answering import answering_engine
from iwopd_megatron.answers import write_whole
from iwopd_megatron.config import Recipe
from iwopd_megatron.config_data import Source
from iwopd_megatron.data import Problem, encode_prompt
from iwopd_megatron.data_sources import read_source
from iwopd_megatron.evaluate import STREAM, grade_samples
from iwopd_megatron.grading import check_graders
from iwopd_megatron.parallel import Parallel
from iwopd_megatron.pass_at_k import summarise
from iwopd_megatron.rollout import Prompt, RolloutEngine, Sampling
from iwopd_megatron.trajectory import Trajectory

PREFIX_STREAM = STREAM - 1  # random numbers of the answers that are cut; no continuation's
FILE = "prefixes.json"


@dataclass(frozen=True)
class PrefixStudy:
    """What is asked. `recipe` is the run's; `student` and `teacher` only write answers."""

    recipe: Recipe
    student: Recipe
    teacher: Recipe
    fractions: list[float]
    problems: int
    samples: int
    out: Path

    @property
    def limit(self) -> int:
        return self.recipe.rollout.max_response_tokens


def study_prefixes(study: PrefixStudy, parallel: Parallel, say: Callable[[str], None]) -> None:
    """Write out/prefixes.json. Collective; prompts are dealt to the ranks."""
    recipe = study.recipe
    problems = read_source(Source(path=recipe.data.eval))[0][: study.problems]
    check_graders({problem.grader for problem in problems})
    tokenizer = AutoTokenizer.from_pretrained(study.student.student.hf)
    writers = {"student": study.student, "teacher": study.teacher}
    points: list[dict[str, Any]] = [{"fraction": fraction} for fraction in study.fractions]
    whole: list[Trajectory] = []
    for who, writer in writers.items():  # one at a time is in memory, the student first
        with answering_engine(writer, parallel, say) as engine:
            whole = whole or _answers(engine, study, problems, tokenizer)
            for point in points:
                prefixes = [cut(sample, point["fraction"]) for sample in whole]
                point["tokens"] = float(numpy.mean([len(x.response_ids) for x in prefixes]))
                point[who] = summarise(_continue(engine, study, prefixes, problems, tokenizer))
                low, high = point[who]["mean_interval"]
                say(
                    f"{who} from {point['fraction']:.0%} of the student's answers: "
                    f"{point[who]['mean']:.3f} right [{low:.3f}, {high:.3f}]"
                )
    if parallel.is_main:
        found = {who: str(writer.student.hf) for who, writer in writers.items()}
        found |= {"engine": study.student.rollout.engine, "problems": len(problems)}
        found |= {"samples": study.samples, "points": points}
        write_whole(study.out / FILE, json.dumps(found, indent=2) + "\n")


def cut(sample: Trajectory, fraction: float) -> Trajectory:
    """The first tokens of a response: `fraction` of them, rounded down, never its last one."""
    kept = min(int(fraction * len(sample.response_ids) + 1e-9), len(sample.response_ids) - 1)
    return replace(sample, response_ids=sample.response_ids[:kept], rollout_logp=[])


def joined(prefix: Trajectory, rest: Trajectory) -> Trajectory:
    """The whole response."""
    ids = prefix.response_ids + rest.response_ids
    return replace(prefix, response_ids=ids, truncated=rest.truncated)


def _answers(
    engine: RolloutEngine, study: PrefixStudy, problems: list[Problem], tokenizer: Any
) -> list[Trajectory]:
    """The student's whole answers, one a problem."""
    prompts = [Prompt(i, encode_prompt(tokenizer, p.prompt)) for i, p in enumerate(problems)]
    temperature = study.recipe.evaluate.temperature
    return engine.generate(prompts, Sampling(study.limit, temperature, stream=PREFIX_STREAM))


def _continue(
    engine: RolloutEngine, study: PrefixStudy, prefixes: list[Trajectory], problems: list[Problem],
    tokenizer: Any,
) -> numpy.ndarray:  # fmt: skip
    """Grades `[problems, samples]` of the answers that go on from the prefixes."""
    pairs = [prefix for prefix in prefixes for _ in range(study.samples)]
    prompts = [
        Prompt(i, x.prompt_ids + x.response_ids, given=len(x.response_ids))
        for i, x in enumerate(pairs)
    ]
    temperature = study.recipe.evaluate.temperature
    rests = engine.generate(prompts, Sampling(study.limit, temperature, stream=STREAM))
    whole = [joined(*pair) for pair in zip(pairs, rests, strict=True)]
    asked = [problem for problem in problems for _ in range(study.samples)]
    grades = grade_samples(whole, asked, tokenizer)
    return numpy.array(grades).reshape(len(problems), study.samples)
