"""Recipes that ship are found by name from any folder; `iwopd init` writes one to start from."""

from pathlib import Path

import pytest

from iwopd_megatron.cli import main as cli
from iwopd_megatron.config.load import load_recipe, read_recipe
from iwopd_megatron.errors import RecipeError
from iwopd_megatron.files.shipped import RECIPES
from iwopd_megatron.plan.plan import plan

DEMO = "demo_tiny_moe"


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """An empty folder, which is not the repository."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def iwopd(monkeypatch, capsys):
    """(exit code, stdout, stderr) of a command of this process."""

    def run(*words):
        monkeypatch.setattr("sys.argv", ["iwopd", *map(str, words)])
        with pytest.raises(SystemExit) as left:
            cli.main()
        said = capsys.readouterr()
        return left.value.code, said.out, said.err

    return run


@pytest.mark.parametrize("name", sorted(file.stem for file in RECIPES.glob("*.yaml")))
def test_every_recipe_has_a_name(name):
    assert read_recipe(Path(name)) == read_recipe(RECIPES / f"{name}.yaml")


@pytest.mark.parametrize("name", [DEMO, f"{DEMO}.yaml", f"recipes/{DEMO}.yaml"])
def test_models_and_data_of_a_shipped_recipe_are_found(name):
    recipe = load_recipe(Path(name))
    assert recipe.student.hf == RECIPES / "demo" / "student"
    assert recipe.data.train[0].path == RECIPES / "demo" / "train.jsonl"
    assert recipe.out == Path("runs/demo_tiny_moe")  # what is written stays here


def test_a_source_of_a_list_is_found():
    sources = "data.train=[{path: recipes/demo/train.jsonl, source: math}]"
    recipe = load_recipe(Path(DEMO), [sources, "student.hf=recipes/demo/teacher"])
    assert recipe.data.train[0].path == RECIPES / "demo" / "train.jsonl"
    assert recipe.student.hf == RECIPES / "demo" / "teacher"


@pytest.mark.parametrize("file", [DEMO, f"{DEMO}.yaml"])
def test_a_file_of_the_name_in_the_current_folder_wins(file):
    Path(file).write_text("extends: recipes/own.yaml\ntrain: {rounds: 7}\n")
    Path("recipes").mkdir()
    Path("recipes/own.yaml").write_text(
        "out: x\nstudent: {hf: recipes/demo/student}\ndata: {train: recipes/demo/train.jsonl}\n"
    )
    Path("recipes/demo/student").mkdir(parents=True)
    recipe = read_recipe(Path(DEMO))
    assert (recipe.train.rounds, recipe.teacher) == (7, None)
    assert recipe.student.hf == Path("recipes/demo/student")  # this folder's goes first
    assert recipe.data.train[0].path == RECIPES / "demo/train.jsonl"


def test_a_folder_of_the_name_is_no_recipe():
    Path(DEMO).mkdir()
    assert read_recipe(Path(DEMO)).student.hf == RECIPES / "demo/student"
    Path("mine").mkdir()
    with pytest.raises(RecipeError, match="mine is a folder; name a YAML file"):
        read_recipe(Path("mine"))


def test_an_unknown_name_is_told_its_neighbours(iwopd):
    code, said, sentence = iwopd("plan", "qwen3_235b_to_30b")
    assert (code, said) == (2, "")
    assert sentence == (
        "error: recipe qwen3_235b_to_30b does not exist; the shipped recipes with the nearest "
        "names are qwen3_235b_a22b_to_30b_a3b, qwen3_4b_to_0p6b and qwen3_4b_to_4b.\n"
    )


def test_commands_take_names(iwopd):
    code, said, _ = iwopd("plan", "qwen3_235b_a22b_to_30b_a3b")
    assert code == 0 and "verdict" in said
    code, _, sentence = iwopd("sft", DEMO)
    assert code == 2 and "has a teacher" in sentence
    code, _, sentence = iwopd("eval", DEMO, "--bench", "nowhere")
    assert code == 2 and "nowhere" in sentence and "neither a recipe" not in sentence
    code, _, sentence = iwopd("eval", "nothing")
    assert (code, "nothing is neither a recipe nor a run" in sentence) == (2, True)


def test_init_writes_a_recipe_that_plans_and_has_data(iwopd, elsewhere):
    code, said, _ = iwopd("init", "new/mine")
    assert code == 0 and "wrote new/mine/recipe.yaml" in said
    recipe = read_recipe(Path("new/mine/recipe.yaml"))
    assert recipe.is_distilling and plan(recipe).fits
    text = Path("new/mine/recipe.yaml").read_text()
    assert "$" not in text and text.count("# Required") == 4
    code, said, _ = iwopd("init", "other", "--student", RECIPES / "demo/student", "--teacher", "x")
    recipe = read_recipe(Path("other/recipe.yaml"))
    assert (recipe.student.hf, recipe.teacher.hf) == (RECIPES / "demo/student", Path("x"))


def test_what_init_writes_passes_data_and_doctor(iwopd, monkeypatch):
    models = ["--student", RECIPES / "demo/student", "--teacher", RECIPES / "demo/teacher"]
    assert iwopd("init", "mine", *models)[0] == 0
    monkeypatch.chdir("mine")
    short = ["rollout.max_prompt_tokens=60", "rollout.max_response_tokens=60"]
    for command in ("data", "doctor"):
        monkeypatch.setattr("sys.argv", ["iwopd", command, "recipe.yaml", *short])
        with pytest.raises(SystemExit) as left:
            cli.main()
        assert left.value.code == 0


def test_the_demo_of_init_loads(iwopd, monkeypatch):
    assert iwopd("init", "demo", "--demo")[0] == 0
    monkeypatch.chdir("demo")
    recipe = load_recipe(Path("recipe.yaml"))
    assert recipe.student.hf == Path("demo/student") and recipe.data.eval.is_file()


def test_init_leaves_what_is_there(iwopd, elsewhere):
    Path("full").mkdir()
    Path("full/file").touch()
    for more in ([], ["--demo"]):
        code, _, sentence = iwopd("init", "full", *more)
        assert (code, sentence) == (
            2,
            "error: full is not empty; name a new folder, or an empty one.\n",
        )
    assert [file.name for file in elsewhere.rglob("*")] == ["full", "file"]
    code, _, sentence = iwopd("init", "full/file")
    assert (code, "is no folder" in sentence) == (2, True)
    code, _, sentence = iwopd("init", "new", "--demo", "--student", "x")
    assert code == 2 and "--demo has models and data of its own" in sentence
