"""What a recipe trains on: its sources read, filtered, counted, encoded, and put in an order."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from iwopd_megatron.config.data import Source
from iwopd_megatron.config.recipe import Recipe
from iwopd_megatron.data.benchmarks import load_benchmark
from iwopd_megatron.data.contamination import contaminated, duplicates
from iwopd_megatron.data.problems import MixedOrder, Order, Problem, PromptOrder
from iwopd_megatron.data.prompts import training_prompts
from iwopd_megatron.data.sources import read_source, resolve
from iwopd_megatron.errors import RecipeError

Encoded = tuple[Problem, list[int]]


@dataclass
class Counts:
    """What became of a source's rows; `duplicate` and `contaminated` are None if not looked for."""

    title: str
    rows: int
    easy: int
    duplicate: int | None = None
    contaminated: int | None = None
    too_long: int = 0
    long_response: int = 0  # where a model is fine-tuned on responses
    kept: int = 0
    answered: int = 0  # rows of messages that end with an assistant's
    lengths: list[int] = field(default_factory=list)  # tokens of the prompts, too long ones too


@dataclass
class TrainingSet:
    """Problems with the token ids of their prompts, one source after the other.

    shares: of each source in the mix; None for as many as there are.
    """

    problems: list[Encoded]
    counts: list[Counts]
    shares: list[float] | None

    @property
    def too_long(self) -> int:
        """Prompts that are left out because they are too long."""
        return sum(counts.too_long for counts in self.counts)

    @property
    def notes(self) -> list[str]:
        """Sentences on what was done to rows without being asked for."""
        out = []
        for counts in self.counts:
            rows = f"of {counts.rows} rows of {counts.title}"
            if counts.answered:
                out.append(
                    f"{counts.answered} {rows} end with an assistant's message; it is the "
                    "response, and no part of the prompt."
                )
            if counts.long_response:
                out.append(
                    f"{counts.long_response} {rows} have a response that is longer, with its EOS, "
                    "than rollout.max_response_tokens and are left out."
                )
        return out

    def check(self, limit: int) -> None:
        """Refuse a source of which nothing is left; RecipeError says why.

        limit: tokens of the longest prompt.
        """
        for counts in self.counts:
            if counts.too_long and not counts.kept:
                raise RecipeError(
                    f"every prompt of {counts.title} is longer than "
                    f"rollout.max_prompt_tokens={limit}; raise it."
                )
            if counts.long_response and not counts.kept:
                raise RecipeError(
                    f"every response of {counts.title} is longer, with its EOS, than "
                    "rollout.max_response_tokens; raise it."
                )
            if not counts.kept:
                raise RecipeError(
                    f"every problem of {counts.title} is removed as a duplicate or contaminated; "
                    "leave the source out of data.train."
                )

    def order(self, seed: int, shuffle: bool) -> Order:
        """Return the problems' order, the same for every run with this seed and data."""
        if self.shares is None:
            return PromptOrder(len(self.problems), seed, shuffle)
        return MixedOrder([counts.kept for counts in self.counts], self.shares, seed, shuffle)


@dataclass
class Rows:
    """A recipe's problems, one source after the other, and which of them are left out."""

    sources: list[tuple[Counts, list[Problem]]]
    is_removed: list[bool]

    @property
    def problems(self) -> list[Problem]:
        """The problems of all sources."""
        return [problem for _, part in self.sources for problem in part]


def load_training_set(recipe: Recipe, tokenizer: Any, examine: bool = False) -> TrainingSet:
    """Read, filter and encode a recipe's training problems.

    examine: look for duplicates and contamination also where the recipe does not ask for it.
    """
    return encode_rows(recipe, read_training_rows(recipe, examine), tokenizer)


def read_training_rows(recipe: Recipe, examine: bool = False) -> Rows:
    """Do all of `load_training_set` that needs no tokenizer."""
    data = recipe.data
    sources = [_read(source, not recipe.is_distilling) for source in map(resolve, data.train)]
    problems = [problem for _, part in sources for problem in part]
    twice = duplicates(problems) if data.remove_duplicates or examine else None
    seen = None
    if data.remove_contaminated or examine:
        seen = contaminated(problems, held_out_problems(recipe))
    first = 0
    for counts, part in sources:
        places = slice(first, first := first + len(part))
        counts.duplicate = sum(twice[places]) if twice is not None else None
        counts.contaminated = sum(seen[places]) if seen is not None else None
    reasons = ((data.remove_duplicates, twice), (data.remove_contaminated, seen))
    marks = [found for is_reason, found in reasons if is_reason and found is not None]
    is_removed = [any(mark[place] for mark in marks) for place in range(len(problems))]
    return Rows(sources, is_removed)


def encode_rows(recipe: Recipe, rows: Rows, tokenizer: Any) -> TrainingSet:
    """Encode the problems that are not left out; count and leave out those that are too long."""
    limit, prompts = recipe.rollout.max_prompt_tokens, training_prompts(recipe, tokenizer)
    kept: list[Encoded] = []
    is_removed = iter(rows.is_removed)
    for counts, part in rows.sources:
        before = len(kept)
        for problem in part:
            if next(is_removed):
                continue
            ids = prompts.encode(problem)
            counts.lengths.append(len(ids))
            if len(ids) > limit:
                counts.too_long += 1
            elif not recipe.is_distilling and not _has_room(recipe, problem.target, tokenizer):
                counts.long_response += 1
            else:
                kept.append((problem, ids))
        counts.kept = len(kept) - before
    # every source has a share, or none has: the data section refuses anything else
    shares = [source.share for source in recipe.data.train if source.share is not None]
    return TrainingSet(kept, [counts for counts, _ in rows.sources], shares or None)


def _has_room(recipe: Recipe, response: str, tokenizer: Any) -> bool:
    """Return whether a response and its EOS are no longer than what an engine may write."""
    limit = recipe.rollout.max_response_tokens - 1
    if len(response.encode()) <= limit:  # a token has a byte at least
        return True
    return len(tokenizer.encode(response, add_special_tokens=False)) <= limit


def _read(source: Source, need_response: bool) -> tuple[Counts, list[Problem]]:
    problems, rows, easy = read_source(source, need_response)
    answered = sum(problem.is_answered for problem in problems)
    return Counts(source.title, rows, easy, answered=answered), problems


def held_out_problems(recipe: Recipe) -> list[Problem]:
    """Return the problems of data.eval and data.held_out."""
    own, out = recipe.data.benchmarks, []
    if recipe.data.eval is not None:
        out += read_source(Source(path=recipe.data.eval))[0]
    for name in recipe.data.held_out:
        path = Path(name)
        looks_like_a_file = "/" in name or bool(path.suffix) or path.exists()
        out += (
            read_source(Source(path=path))[0]
            if name not in own and looks_like_a_file
            else load_benchmark(name, own).problems
        )
    return out
