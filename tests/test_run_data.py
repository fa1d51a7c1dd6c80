"""What is wrong with the data of a run is found by whoever starts it, before anything is there."""

import json
import pickle
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoTokenizer
from typer.testing import CliRunner

from iwopd_megatron.cli.main import app
from iwopd_megatron.config.load import load_recipe
from iwopd_megatron.data.before_start import check_before_launch
from iwopd_megatron.data.benchmarks import Benchmark
from iwopd_megatron.data.run_data import asked, check_room, load_all, load_run_data
from iwopd_megatron.data.sources import read_source
from iwopd_megatron.errors import RecipeError
from iwopd_megatron.evaluation.answering import answering_recipe
from iwopd_megatron.runtime import local_world

RECIPE = "recipes/demo_tiny_moe.yaml"
OTHER_TEMPLATE = "gates.same_chat_template=false"  # the teacher has none
ROW = {"question": "hgfedcba=", "answer": "abcdefgh", "difficulty": 8, "source": "selection_sort"}
CONVERSATION = [{"role": "system", "content": "ab"}, {"role": "user", "content": "hgfedcba="}]
TEMPLATE = (
    "{% for m in messages %}{{ m.content }}<eos>{% endfor %}"
    "{% if not enable_thinking %}<pad><unused>{% endif %}"
)

pytestmark = pytest.mark.usefixtures("in_the_repository")


@pytest.fixture(autouse=True)
def no_world(monkeypatch):
    """A world that is started fails the test."""

    def start(*_):
        raise AssertionError("a world was started")

    # first in the file that imports it: whoever imports the original later must not get the stub
    monkeypatch.setattr("iwopd_megatron.cli.worker.start_local", start)
    monkeypatch.setattr(local_world, "start_local", start)


@pytest.fixture(scope="module")
def templated(tmp_path_factory) -> Path:
    """The demo's student with a chat template."""
    folder = shutil.copytree(
        Path(__file__).parents[1] / "recipes/demo/student", tmp_path_factory.mktemp("hf") / "hf"
    )
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


def write(path: Path, *rows: dict) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def refused(*words) -> str:
    """The sentence with which a command exits."""
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert isinstance(result.exception, RecipeError), result.exception
    message = str(result.exception)
    assert "\n" not in message and message.endswith(".")
    return message


@pytest.fixture
def damaged(tmp_path) -> Path:
    path = write(tmp_path / "damaged.jsonl", ROW)
    path.write_text(path.read_text() + "{\n")
    return path


@pytest.mark.parametrize("key", ["data.train", "data.eval", "data.held_out"])
def test_train_finds_damaged_files_first(tmp_path, damaged, key):
    value = f"[{damaged}]" if key == "data.held_out" else damaged
    words = [f"{key}={value}", "data.remove_contaminated=true", f"out={tmp_path}/run"]
    assert "damaged.jsonl line 2 is not JSON" in refused("train", RECIPE, *words)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("row", "words", "sentence"),
    [
        ({"source": "poetry"}, [], "rows.jsonl line 2: no grader 'poetry'; known graders"),
        ({"difficulty": None}, [], "rows.jsonl line 2: difficulty None is not a number"),
        ({"question": CONVERSATION}, [], "rows.jsonl line 2 has 2 messages, but .* no chat templ"),
        ({}, ["rollout.max_prompt_tokens=2"], "every prompt of .*rows.jsonl is longer than"),
        ({}, ["data.enable_thinking=true"], "data.enable_thinking=true does nothing"),
        ({}, ["evaluate.enable_thinking=true"], "evaluate.enable_thinking=true does nothing"),
        ({}, ["evaluate.benchmarks=[nowhere]"], "no benchmark 'nowhere'; known ones"),
        ({}, ["data.held_out=[nowhere.jsonl]", "data.remove_contaminated=true"], "nowhere.jsonl d"),
        (
            {}, ["teacher=null", "teachers={math: {hf: recipes/demo/teacher}}"],
            "problems of source 'selection_sort', but there are teachers only for math",
        ),
    ],
)  # fmt: skip
def test_train_finds_wrong_problems_first(tmp_path, row, words, sentence):
    rows = write(tmp_path / "rows.jsonl", ROW, ROW | row)
    message = refused("train", RECIPE, f"data.train={rows}", f"out={tmp_path}/run", *words)
    assert re.search(sentence, message) and not (tmp_path / "run").exists()


def test_eval_problems_that_nobody_grades_or_that_leave_no_room(tmp_path):
    words = ["train", RECIPE, f"out={tmp_path}/run"]
    rows = write(tmp_path / "rows.jsonl", ROW, ROW | {"source": "poetry"})
    assert "rows.jsonl line 2: no grader 'poetry'" in refused(*words, f"data.eval={rows}")
    write(rows, ROW, ROW | {"question": "a" * 100})
    message = refused(*words, f"data.eval={rows}")
    assert "data.eval (100 tokens)" in message and "max_response_tokens=28" in message
    assert not (tmp_path / "run").exists()


def test_the_other_commands_that_start_something(tmp_path, damaged, monkeypatch):
    run = tmp_path / "run"
    where, bad = f"out={run}", f"data.train={damaged}"
    sentence = "damaged.jsonl line 2 is not JSON"
    response = write(tmp_path / "rows.jsonl", ROW | {"response": "a"}, ROW)
    none, rows = "teacher=null", f"data.train={response}"
    assert "line 2 lacks 'response'" in refused("sft", RECIPE, none, rows, where)
    assert sentence in refused("compare", RECIPE, bad, "--out", run, "--seeds", 1)
    assert sentence in refused("launch", RECIPE, bad, where)
    words = ["--bench", "few", "--bench-file", f"few={damaged}", "--out", run]
    assert sentence in refused("eval", RECIPE, *words)
    assert sentence in refused("data", RECIPE, bad)
    write(damaged, ROW | {"question": CONVERSATION})
    assert "has 2 messages, but" in refused("eval", RECIPE, *words)
    write(damaged, ROW | {"source": "poetry"})
    assert "no grader 'poetry'" in refused("eval", RECIPE, *words)
    assert not run.exists()


def test_prefixes_finds_damaged_files_first(tmp_path, damaged):
    text = Path(RECIPE).read_text().replace("recipes/demo/eval.jsonl", str(damaged))
    (tmp_path / "recipe.yaml").write_text(text)
    shutil.copytree("recipes/demo/student", tmp_path / "hf")
    assert "line 2 is not JSON" in refused("prefixes", tmp_path)
    write(damaged, ROW | {"question": CONVERSATION})
    assert "has 2 messages, but" in refused("prefixes", tmp_path)


def test_launching_looks_at_rows_without_a_tokenizer(tmp_path, damaged):
    """A login node may have none; what is on the hub is the job's to check."""
    code = (
        "import sys; from pathlib import Path;"
        "from iwopd_megatron.config.load import load_recipe;"
        "from iwopd_megatron.data.before_start import check_before_launch;"
        f"assert check_before_launch(load_recipe(Path({RECIPE!r}))) == [];"
        "names = {'torch', 'numpy', 'transformers', 'datasets', 'pyarrow'};"
        "print(names & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "set()\n", done.stderr
    hub = ["data.train=[{name: deepmath}]", "evaluate.benchmarks=[aime24, toy]"]
    (note,) = check_before_launch(load_recipe(Path(RECIPE), hub))
    assert note.startswith("zwhe99/DeepMath-103K, aime24 of the hub: checked when the job starts")
    with pytest.raises(RecipeError, match="line 2 is not JSON"):
        check_before_launch(load_recipe(Path(RECIPE), [*hub, f"data.eval={damaged}"]))


def test_what_one_package_less_leaves_unchecked(tmp_path, monkeypatch):
    path = tmp_path / "rows.parquet"
    path.write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (note,) = check_before_launch(load_recipe(Path(RECIPE), [f"data.train={path}"]))
    assert "checked when the job starts" in note and "pyarrow is not installed here" in note


def texts(data, folder):
    """A training prompt, one of data.eval and one of the toy benchmark."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = [data.training.problems[0][1], data.main.prompts[0], data.named["toy"].prompts[0]]
    return [tokenizer.decode(x) for x in ids]


@pytest.mark.parametrize(
    ("words", "thinks"),
    [
        ([], (False, False)),
        (["data.enable_thinking=true"], (True, True)),
        (["evaluate.enable_thinking=true"], (False, True)),
        (["data.enable_thinking=true", "evaluate.enable_thinking=false"], (True, False)),
    ],
)
def test_thinking_in_every_prompt(templated, tmp_path, words, thinks):
    settings = [f"student.hf={templated}", "evaluate.benchmarks=[toy]", "evaluate.problems=1"]
    recipe = load_recipe(Path(RECIPE), [*settings, OTHER_TEMPLATE, *words])
    closed = "<eos><pad><unused>"
    prompts = texts(load_run_data(recipe), templated)
    assert [not prompt.endswith(closed) for prompt in prompts] == [thinks[0], thinks[1], thinks[1]]
    # `iwopd eval` and `iwopd prefixes` ask through the recipe of a model that only answers
    answering = answering_recipe(recipe, recipe.student, tmp_path)
    problems = read_source(recipe.data.train[0])[0][:1]
    (benchmark,) = asked(answering, [Benchmark("few", problems)], 43, "{}")
    last = AutoTokenizer.from_pretrained(templated).decode(benchmark.prompts[0])
    assert last.endswith(closed) != thinks[1]


def test_arms_share_what_they_ask_alike():
    vary = ["loss.weighting.rule=uniform", "train.seed=2", "rollout.max_prompt_tokens=17"]
    recipes = [load_recipe(Path(RECIPE), [word]) for word in ["train.seed=1", *vary]]
    first, *same, other = load_all(recipes)
    assert all(data is first for data in same) and other is not first
    assert pickle.loads(pickle.dumps(first)) == first  # a world that is spawned is sent it


def test_room_on_servers():
    """They are started for the recipe's lengths, whatever the model could take."""
    words = ["rollout.engine=sglang", "rollout.servers.start=1", "rollout.max_prompt_tokens=10"]
    recipe = load_recipe(Path(RECIPE), words)
    check_room(recipe, Benchmark("few", [], [[1] * 10]), 43, "{}")
    with pytest.raises(RecipeError, match="started for.*= 53; write rollout.max_prompt_tokens=11"):
        check_room(recipe, Benchmark("few", [], [[1] * 11]), 43, "{}")


def test_answers_at_the_end_are_noted(tmp_path, templated):
    said = [*CONVERSATION, {"role": "assistant", "content": "ab"}]
    rows = write(tmp_path / "rows.jsonl", ROW, ROW | {"question": said})
    words = [f"student.hf={templated}", f"data.train={rows}", "data.eval=null", OTHER_TEMPLATE]
    data = load_run_data(load_recipe(Path(RECIPE), words))
    (note,) = data.notes
    assert note.startswith(f"1 of 2 rows of {rows} end with an assistant's message")


def spoiled(folder, tmp_path, name, change):
    """A copy of a model folder with one tokenizer file changed."""
    place = tmp_path / "spoiled"
    shutil.copytree(folder, place)
    content = json.loads((place / name).read_text())
    change(content)
    (place / name).write_text(json.dumps(content))
    return place


def exchange(tokenizer):
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]


@pytest.mark.parametrize(
    ("role", "name", "change", "words"),
    [
        ("teacher", "tokenizer.json", exchange, "differ: 'a' is 3 against 4"),
        ("teacher", "tokenizer.json", lambda t: t.clear(), "cannot be loaded"),
        ("base", "tokenizer.json", exchange, "differ: 'a' is 3 against 4"),
        ("student", "tokenizer_config.json", lambda t: t.pop("eos_token"), "EOS is None for"),
        ("teacher", "tokenizer_config.json", lambda t: t.update(chat_template="{{ 1 }}"),
         "the chat templates of"),
    ],
)  # fmt: skip
def test_tokenizers_are_compared_first(role, name, change, words, tmp_path):
    folder = spoiled(Path("recipes/demo/student"), tmp_path, name, change)
    settings = [f"{role}.hf={folder}", "loss.extrapolation=1.2"]
    with pytest.raises(RecipeError, match=words):
        load_run_data(load_recipe(Path(RECIPE), settings))
