"""What a recipe trains on: filters, duplicates, contamination, mixes; what `iwopd data` says."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from iwopd_megatron.config.load import load_recipe
from iwopd_megatron.data.benchmarks import load_benchmark
from iwopd_megatron.data.contamination import contaminated, duplicates
from iwopd_megatron.data.problems import Problem
from iwopd_megatron.data.training_set import load_training_set
from iwopd_megatron.errors import RecipeError

RECIPE = Path("recipes/demo_tiny_moe.yaml")
WORDS = "a b c d e f g h i j k l m n o p q r s t u v w x y z".split()


def problem(question: str) -> Problem:
    return Problem(question, "1", 1.0, "math")


def test_thirteen_words_in_a_row():
    held_out = [problem("Zero. " + " ".join(WORDS[:15]).upper() + ", end"), problem("Short: 2+2?")]
    cases = {
        "say " + ", ".join(WORDS[2:15]) + "!": True,  # 13 of them, other marks between
        "say " + " ".join(WORDS[3:15]): False,  # 12
        "short (2 + 2)": True,  # fewer words than 13: the whole
        "short 2 + 2 more": False,
        "": False,
    }
    assert contaminated([problem(text) for text in cases], held_out) == list(cases.values())


def test_duplicates_are_later_ones():
    texts = ["a  b", "a b", "A b", "c", "a\nb"]
    assert duplicates([problem(text) for text in texts]) == [False, True, False, False, True]


def test_an_accent_may_be_a_character_of_its_own():
    asked, held_out = (problem(f"Le caf{e} bout") for e in ("e\u0301", "\u00e9"))
    assert duplicates([asked, held_out]) == [False, True]
    assert contaminated([asked], [held_out]) == [True]


def write(path, questions, source="selection_sort"):
    rows = [{"question": q, "answer": "abc", "difficulty": 1, "source": source} for q in questions]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def files(tmp_path):
    """Four prompts of which two are alike and one is held out; three of which one is too long."""
    one = write(tmp_path / "one.jsonl", ["ab=", "cd=", "ab=", "ef="])
    two = write(tmp_path / "two.jsonl", ["a" * 20 + "=", "gh=", "ij="], "other")
    return one, two, write(tmp_path / "eval.jsonl", ["cd=", "kl="])


def load(files, *settings, examine=False):
    one, two, held_out = files
    train = json.dumps([{"path": str(one), "share": 3}, {"path": str(two), "share": 1}])
    recipe = load_recipe(RECIPE, [f"data.train={train}", f"data.eval={held_out}", *settings])
    tokenizer = AutoTokenizer.from_pretrained(recipe.student.hf)
    return load_training_set(recipe, tokenizer, examine)


def figures(found):
    names = ("rows", "duplicate", "contaminated", "too_long", "kept")
    return [[getattr(counts, name) for name in names] for counts in found.counts]


def test_reported_and_removable(files):
    assert figures(load(files)) == [[4, None, None, 0, 4], [3, None, None, 1, 2]]
    assert figures(load(files, examine=True)) == [[4, 1, 1, 0, 4], [3, 0, 0, 1, 2]]
    found = load(files, "data.remove_duplicates=true", "data.remove_contaminated=true")
    assert figures(found) == [[4, 1, 1, 0, 2], [3, 0, 0, 1, 2]]
    assert [p.question for p, _ in found.problems] == ["ab=", "ef=", "gh=", "ij="]
    assert found.too_long == 1 and max(found.counts[1].lengths) == 21


def test_benchmarks_are_held_out_sets_too(files):
    one = files[0]
    toy = load_benchmark("toy", {}).problems[7].question
    write(one, ["ab=", toy])
    found = load(files, "data.held_out=[toy]", "data.remove_contaminated=true")
    assert [p.question for p, _ in found.problems][:1] == ["ab="] and found.counts[0].kept == 1


def test_mixed_order(files):
    found = load(files)
    taken = found.order(seed=1, shuffle=True).take(200)
    assert sum(i < 4 for i in taken) == 150
    assert taken == load(files, "loss.weighting.rule=iw").order(1, True).take(200)


def test_nothing_left(files):
    with pytest.raises(RecipeError, match="every prompt of .*one.jsonl is longer than"):
        load(files, "rollout.max_prompt_tokens=2").check(2)
    write(files[0], ["cd=", "cd="])
    with pytest.raises(RecipeError, match="one.jsonl is removed as a duplicate or contaminated"):
        load(files, "data.remove_contaminated=true").check(16)


def test_responses_that_no_engine_may_write(tmp_path):
    """Left out as too long prompts are, but only where a model is fine-tuned on them."""
    path = tmp_path / "data.jsonl"
    row = {"question": "ab=", "answer": "ab", "difficulty": 1, "source": "selection_sort"}
    rows = [row | {"response": "a" * count} for count in (42, 43)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = [f"data.train={path}", "data.eval=null"]
    recipe = load_recipe(RECIPE, [*words, "teacher=null"])
    assert recipe.rollout.max_response_tokens == 43
    tokenizer = AutoTokenizer.from_pretrained(recipe.student.hf)
    found = load_training_set(recipe, tokenizer)
    assert [len(problem.response) for problem, _ in found.problems] == [42]
    assert found.notes[0].startswith(f"1 of 2 rows of {path} have a response that is longer")
    assert len(load_training_set(load_recipe(RECIPE, words), tokenizer).problems) == 2
    path.write_text(json.dumps(rows[1]) + "\n")
    with pytest.raises(RecipeError, match="every response of .*data.jsonl is longer"):
        load_training_set(recipe, tokenizer).check(16)


@pytest.mark.parametrize(
    ("train", "message"),
    [
        ("[{suffix: x}]", "data.train.0.*a source needs a path, or the name"),
        ("[{path: x, colums: {}}]", "unknown key 'data.train.0.colums'; did you mean 'columns'"),
        ("[]", "data.train' is an empty list; write a list of 1 or more"),
        ("[{path: x, share: 1}, {path: y}]", "every source of train a share, or none"),
        ("[{path: nowhere.jsonl}]", "data.train: file nowhere.jsonl does not exist"),
    ],
)
def test_refused_recipes(train, message):
    with pytest.raises(RecipeError, match=message) as error:
        load_recipe(RECIPE, [f"data.train={train}"])
    assert "\n" not in str(error.value)


def test_command(files):
    one, two, held_out = files
    sorts = {"path": str(two), "share": 1, "grader": "selection_sort"}
    train = json.dumps([{"path": str(one), "share": 3}, sorts])
    settings = [f"data.train={train}", f"data.eval={held_out}", "train.rounds=10"]
    command = [sys.executable, "-W", "ignore", "-m", "iwopd_megatron", "data", RECIPE, *settings]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0 and result.stderr == ""
    assert "6 prompts, 64 a round: 10 rounds are passes of 120.00 over" in result.stdout
    assert result.stdout.count("\nprompt ") == 3 and "answer: abc" in result.stdout


def test_command_shows_the_templates_tokens(tmp_path):
    """Qwen3's template opens and closes the thinking part itself when thinking is off."""
    folder = shutil.copytree("recipes/demo/student", tmp_path / "student")
    template = (
        "{% for message in messages %}<eos>{{ message.content }}{% endfor %}"
        "{% if add_generation_prompt and not enable_thinking %}<pad><unused>{% endif %}"
    )
    (folder / "chat_template.jinja").write_text(template)
    command = [sys.executable, "-W", "ignore", "-m", "iwopd_megatron", "data", RECIPE]
    result = subprocess.run(
        [*command, f"student.hf={folder}"], capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("<pad><unused>\n") == 3 and "<eos>" in result.stdout
