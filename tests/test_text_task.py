"""The task in real language: right answers by another way, a clean split, and graders that tell."""

import json
import re
from itertools import islice

import pytest
from text_answers import computed, kind, said
from typer.testing import CliRunner

from iwopd_megatron.cli.main import app
from iwopd_megatron.config.data import Source
from iwopd_megatron.data.contamination import contaminated, duplicates
from iwopd_megatron.data.sources import read_source
from iwopd_megatron.errors import RecipeError
from iwopd_megatron.grading.graders import check_answer, grade
from iwopd_megatron.grading.pool import Submission
from iwopd_megatron.text_task import (
    OPEN,
    SHORT,
    is_on_topic,
    is_right,
    open_rows,
    short_rows,
    write_task,
)
from iwopd_megatron.text_values import tables

SEEDS = (1, 2, 3)
LITERALS = {  # written down again, not read from the tables
    "opposite": ("hot", "cold"), "capital": ("France", "Paris"), "plural": ("mouse", "mice"),
    "past": ("go", "went"), "young": ("dog", "puppy"), "color": ("grass", "green"),
    "continent": ("Japan", "Asia"), "language": ("Brazil", "Portuguese"),
}  # fmt: skip


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return write_task(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def shorts():
    """Many questions of several seeds, of both splits."""
    return [
        row
        for seed in SEEDS
        for held in (False, True)
        for row in islice(short_rows(seed, held), 400)
    ]


def wrong(row):
    """Return a response that is wrong, of the kind that is asked for."""
    choices = row["answer"].split(" / ")
    if len(choices) > 1:
        return choices[-1]
    if ", " in row["answer"]:
        return ", ".join(reversed(row["answer"].split(", ")))
    return str(int(said(row)) + 1000) if said(row).isdigit() else "xyz"


def test_answers_are_right_by_another_way(shorts):
    checked = [(row, computed(row)) for row in shorts]
    for row, answer in checked:
        assert answer in (None, said(row)), row
    assert len({kind(row) for row, answer in checked if answer is not None}) == 19


def test_answers_of_tables_are_right(shorts):
    for name, (x, answer) in LITERALS.items():
        own = [r for r in shorts if kind(r) == name and re.search(rf"\b{x}\b", r["question"])]
        assert own and {row["answer"] for row in own} == {answer}, name
    for row in shorts:
        choices = row["answer"].split(" / ")
        if kind(row) in ("which", "odd"):
            of = {word: c for c, words in tables()["categories"].items() for word in words}
            kinds = [of[word] for word in choices]
            assert all(word in row["question"] for word in choices) and kinds[0] not in kinds[1:]
            assert kind(row) == "odd" or f"kind of {kinds[0]}" in row["question"]
        if kind(row) == "fact":
            assert sorted(choices) == ["no", "yes"]
    facts = {row["question"]: said(row) for row in shorts if kind(row) == "fact"}
    for animals, answer in (("eagle|pigeon|bee|owl|bat", "yes"), ("dog|cow|horse|fish", "no")):
        flying = {a for q, a in facts.items() if re.search(rf"Can an? (?:{animals}) fly", q)}
        assert flying == {answer}


def test_how_many_and_how_varied(files):
    assert {name: len(rows) for name, rows in files.items()} == {
        "train": 480,
        "eval": 120,
        "eval_open": 60,
    }
    gradable = [row["source"] == SHORT for rows in files.values() for row in rows]
    assert 0.45 < sum(gradable) / len(gradable) < 0.6
    assert sum(row["source"] == SHORT for row in files["train"]) == 240
    everything = [row for rows in files.values() for row in rows]
    assert len({row["question"] for row in everything}) == len(everything) == 660
    assert len({row["template"] for row in everything}) >= 130
    assert len({tuple(row["question"].split()[:5]) for row in everything}) >= 350
    assert max(len(row["question"].split()) for row in everything) <= 30
    assert {kind(row) for row in files["eval"]} == set(tables()["checkable"])


def test_held_out_values_and_wordings_are_never_trained_on(files):
    """Of no seed: values are split by what they are."""

    def filled(row):
        numbers = " ".join(re.findall(r"\d+|'[^']*'", row["question"]))
        return row["template"], numbers, said(row)

    for rows, held in ((short_rows, files["eval"]), (open_rows, files["eval_open"])):
        unseen = {row["template"] for row in held if "unseen" in row["template"]}
        assert 0.4 < sum(row["template"] in unseen for row in held) / len(held) < 0.6
        trained = [row for seed in SEEDS for row in islice(rows(seed), 400)]
        assert not unseen & {row["template"] for row in trained}
        questions = {row["question"] for row in trained}
        assert not questions & {row["question"] for row in held}
        if rows is short_rows:
            numeric = [filled(r) for r in trained if re.search(r"\d|'", r["question"])]
            assert not set(numeric) & {
                filled(row) for row in held if re.search(r"\d|'", row["question"])
            }


def test_the_same_seed_writes_the_same_bytes(files, tmp_path):
    write_task(tmp_path / "a")
    write_task(tmp_path / "b", seed=2)
    for name, rows in files.items():
        text = (tmp_path / "a" / f"{name}.jsonl").read_text()
        assert [json.loads(line) for line in text.splitlines()] == rows
        assert text != (tmp_path / "b" / f"{name}.jsonl").read_text()


def test_the_project_reads_and_grades_every_row(tmp_path):
    write_task(tmp_path)
    problems = {
        name: read_source(Source(path=tmp_path / f"{name}.jsonl"))[0]
        for name in ("train", "eval", "eval_open")
    }
    everything = [problem for part in problems.values() for problem in part]
    assert len(everything) == 660 and not any(duplicates(everything))
    held_out = problems["eval"] + problems["eval_open"]
    assert not any(contaminated(problems["train"], held_out))
    assert {tuple(message) for p in everything for message in p.messages} == {("role", "content")}
    rows = [json.loads(x) for n in problems for x in (tmp_path / f"{n}.jsonl").open()]
    right, bad = [], []
    for row in rows:
        if row["source"] == OPEN:
            mentioned = " and ".join(x.split(" / ")[0] for x in row["answer"].split(", "))
            answers = f"Here: {mentioned}.", "I do not know."
        else:
            answers = f"The answer is {said(row)}.", f"The answer is {wrong(row)}."
        for out, answer in zip((right, bad), answers, strict=True):
            out.append(Submission(row["source"], answer, row["answer"]))
    assert {grade.right for grade in grade(right)} == {1.0}
    assert {grade.right for grade in grade(bad)} == {0.0}


@pytest.mark.parametrize(
    ("response", "answer", "verdict"),
    [
        ("12 + 7 = 19", "19 (given 7 12)", True),
        ("There are 180 minutes in 3 hours.", "180 (given 3)", True),
        ("He has nineteen apples.", "19 (given 7 12)", True),
        ("One says that 12 + 7 is 20.", "19 (given 7 12)", False),
        ("5,000 grams", "5000 (given 5)", True),
        ("19.5", "19 (given 7)", False),
        ("119", "19", False),
        ("", "19", False),
        ("12 + 7", "19 (given 7 12)", False),
        ("Yes, it can.", "yes / no", True),
        ("No. Yes would be wrong.", "yes / no", False),
        ("I know it.", "no / yes", False),
        ("Ann has more than Tom.", "Ann / Tom", True),
        ("Tom has less than Ann.", "Ann / Tom", False),
        ("COLD", "cold", True),
        ("colder", "cold", False),
        ("The capital is New Delhi!", "New Delhi", True),
        ("I'd say c", "d", False),
        ("It is 'd'.", "d", True),
        ("s-h-i-p", "s-h-i-p", True),
        ("cat, ant, bear sorted: ant, bear, cat", "ant, bear, cat", True),
        ("ant, cat, bear", "ant, bear, cat", False),
        ("ant, bear", "ant, bear, cat", False),
        ("3, 13, 30", "3, 13, 30", True),
    ],
)
def test_short_answers(response, answer, verdict):
    assert is_right(response, answer) is verdict


def test_open_instructions_stay_with_their_topic():
    assert is_on_topic("Cats and a puppy", "cat, dog / puppy")
    assert not is_on_topic("Cats only", "cat, dog / puppy")
    assert not is_on_topic("a bobcat", "cat")


@pytest.mark.parametrize("answer", ["a, , b", " / b", ","])
def test_references_that_say_nothing(answer):
    with pytest.raises(RecipeError, match="x line 3: answer .* says nothing at one place"):
        check_answer(SHORT, answer, "x line 3")


def test_the_command(tmp_path):
    done = CliRunner().invoke(app, ["text-task", str(tmp_path / "out"), "--seed", "3"])
    assert done.exit_code == 0, done.output
    assert sorted(x.name for x in (tmp_path / "out").iterdir()) == [
        "eval.jsonl",
        "eval_open.jsonl",
        "train.jsonl",
    ]
    first = done.output.splitlines()[0]
    assert re.search(
        r"train.jsonl: 480 prompts, 240 with an answer; \d+ templates, \d+ first", first
    )
