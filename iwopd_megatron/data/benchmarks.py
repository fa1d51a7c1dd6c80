"""Held-out problems by name: what the paper evaluates on, the demo's task, and a recipe's own.

A name stands for a dataset of the Hugging Face hub or for a file on this machine. Programs are
graded on one greedy answer, everything else on sampled ones.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path

from iwopd_megatron import toy_task
from iwopd_megatron.config.data import Source
from iwopd_megatron.data.problems import Problem
from iwopd_megatron.data.prompts import Prompts
from iwopd_megatron.data.sources import read_source, resolve
from iwopd_megatron.errors import RecipeError
from iwopd_megatron.grading.math.grader import SUFFIX

TOY, TOY_PROBLEMS = "toy", 512
_MATH = {"columns": {"question": "problem"}, "source": "math", "suffix": SUFFIX}
HUB = {
    "aime24": Source(name="HuggingFaceH4/aime_2024", **_MATH),
    "aime25": Source(name="MathArena/aime_2025", **_MATH),
    "hmmt25": Source(name="MathArena/hmmt_feb_2025", **_MATH),
    "hmmt25_nov": Source(name="MathArena/hmmt_nov_2025", **_MATH),
}
EVALPLUS = {  # files, at the path in EvalPlus's own environment variable
    "humaneval+": "HUMANEVAL_OVERRIDE_PATH",
    "mbpp+": "MBPP_OVERRIDE_PATH",
}


@dataclass(frozen=True)
class Benchmark:
    """Held-out problems and the token ids of their prompts."""

    name: str
    problems: list[Problem]
    prompts: list[list[int]] = field(default_factory=list)  # empty: not encoded yet

    @property
    def is_greedy(self) -> bool:
        """Whether one greedy answer to each problem is what counts: all are programs."""
        return all(problem.grader == "code" for problem in self.problems)

    def asked(self, prompts: Prompts) -> Benchmark:
        """Return the benchmark with the token ids of its prompts."""
        return replace(self, prompts=[prompts.encode(problem) for problem in self.problems])


def load_benchmark(name: str, own: dict[str, Source]) -> Benchmark:
    """Return a benchmark by name, without prompts; RecipeError for an unknown name or an unfit row.

    own: the recipe's and the command line's benchmarks, which go before known ones.
    """
    if name == TOY and name not in own:
        rows = islice(toy_task.problems(toy_task.EVAL_SEED), TOY_PROBLEMS)
        return Benchmark(name, [Problem(**row) for row in rows])
    return Benchmark(name, read_source(_source(name, own))[0])


def is_on_hub(name: str, own: dict[str, Source]) -> bool:
    """Return whether a benchmark is a dataset of the Hugging Face hub, no file of this machine."""
    return own[name].path is None if name in own else name in HUB


def with_path(name: str, path: Path, own: dict[str, Source]) -> Source:
    """Return a benchmark's source with its rows at `path`.

    Rows of an unknown benchmark have the columns of `Problem`.
    """
    if name in EVALPLUS and name not in own:
        return Source(name="evalplus", path=path)
    known = own.get(name) or HUB.get(name)
    return known.model_copy(update={"path": path}) if known else Source(path=path)


def _source(name: str, own: dict[str, Source]) -> Source:
    if name in own:
        return resolve(own[name])
    if name in HUB:
        return HUB[name]
    if name in EVALPLUS:
        path = os.environ.get(EVALPLUS[name])
        if path is None:
            raise RecipeError(
                f"{name} is a file of EvalPlus's; write --bench-file {name}=FILE.jsonl or set "
                f"{EVALPLUS[name]}."
            )
        return resolve(with_path(name, Path(path), {}))
    known = ", ".join([*HUB, *EVALPLUS, TOY, *own])
    raise RecipeError(f"no benchmark '{name}'; known ones: {known}. Add one with --bench-file.")
