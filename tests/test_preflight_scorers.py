"""What is refused of teachers before any process starts, and `iwopd serve-teacher`'s choice."""

import pytest
import yaml
from served import ROOT

from iwopd_megatron.cli.serve import choose_teacher
from iwopd_megatron.config.load import load_recipe
from iwopd_megatron.config.models import Layout
from iwopd_megatron.errors import RecipeError
from iwopd_megatron.records.resume import check_resume

pytestmark = pytest.mark.usefixtures("in_the_repository")
RECIPE = ROOT / "recipes/demo_tiny_moe.yaml"
MODEL = "{hf: recipes/demo/teacher}"
SERVED = "{hf: recipes/demo/teacher, service: {}}"
TWO = ["teacher=null", f"teachers.math={SERVED}", f"teachers.code={MODEL}"]


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ([f"teachers.math={MODEL}"], ["has teacher and teachers; keep teacher"]),
        (["teacher.urls=[x:1]"], ["teacher.urls: 'x:1' is not a URL; write http://HOST:PORT"]),
        (["teacher.service={}", "teacher.offload=true"], ["teacher.offload", "is a server"]),
        (
            ["teacher.urls=['http://x']", "teacher.microbatch_tokens=99"],
            ["teacher.microbatch_tokens", "is a server"],
        ),
        (["teacher.service.parallel.tp=3"], ["teacher.service: tp=3", "use one of 1, 2, 4"]),
        (
            ["teacher.service.parallel.tp=2", "teacher.service.processes=3"],
            ["teacher.service.processes=3 is not a multiple of 2", "write teacher.service.proc"],
        ),
        (
            ["teacher.service.microbatch_tokens=40"],
            ["teacher.service.microbatch_tokens=40 cannot hold the longest sample", "59"],
        ),
        (
            ["teacher.service={max_queue_tokens: 100, microbatch_tokens: 200}"],
            ["teacher.service.max_queue_tokens=100 must be at least", "microbatch_tokens=200"],
        ),
        (["teacher.service.prot=1"], ["unknown key 'teacher.service.prot'", "'port'"]),
        (
            [*TWO, "teachers.math.service.prot=1"],
            ["unknown key 'teachers.math.service.prot'", "'port'"],
        ),
        ([*TWO, "teachers.math.hff=x"], ["unknown key 'teachers.math.hff'", "'hf'"]),
        (
            [*TWO, "loss.objective=topk_kl", "loss.topk.k=4"],
            ["several teachers to be servers", "teachers.code is"],
        ),
        (
            [*TWO, "teachers.code.microbatch_tokens=10"],
            ["teachers.code.microbatch_tokens=10 cannot hold"],
        ),
    ],
)
def test_refused_with_one_sentence(overrides, words):
    with pytest.raises(RecipeError) as error:
        load_recipe(RECIPE, overrides)
    message = str(error.value)
    assert "\n" not in message and all(word in message for word in words), message


def test_a_service_has_a_layout_of_its_own():
    recipe = load_recipe(RECIPE, ["teacher.service.parallel={pp: 2, tp: 2}"])
    assert recipe.teacher.service.world == 4 and recipe.world == 2
    assert recipe.teacher.service.parallel == Layout(pp=2, tp=2)


def test_servers_need_no_weights_here(tmp_path):
    folder = tmp_path / "teacher"
    folder.mkdir()
    for name in ("config.json", "tokenizer.json", "generation_config.json"):
        (folder / name).write_bytes((ROOT / "recipes/demo/teacher" / name).read_bytes())
    overrides = [f"teacher.hf={folder}", "teacher.urls=['http://x:1']"]
    assert load_recipe(RECIPE, overrides).teacher.is_remote
    with pytest.raises(RecipeError, match="weights are missing"):
        load_recipe(RECIPE, [f"teacher.hf={folder}", "teacher.service={}"])


def test_serve_teacher_chooses_by_source():
    one, two = load_recipe(RECIPE), load_recipe(RECIPE, TWO)
    assert choose_teacher(one, "", RECIPE) is one.teacher
    assert choose_teacher(two, "code", RECIPE) is two.teachers["code"]
    with pytest.raises(RecipeError, match="--source '' is not a teacher of .* code, math"):
        choose_teacher(two, "", RECIPE)
    with pytest.raises(RecipeError, match="--source 'law' .* none: leave --source out"):
        choose_teacher(one, "law", RECIPE)
    sft = load_recipe(ROOT / "recipes/demo_tiny_moe.yaml", ["teacher=null"])
    with pytest.raises(RecipeError, match="has no teacher to serve; add teacher.hf"):
        choose_teacher(sft, "", RECIPE)


def test_a_resumed_run_may_move_its_teachers_but_not_change_them(tmp_path):
    overrides = [*TWO, f"out={tmp_path}"]
    recipe = load_recipe(RECIPE, overrides)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe.model_dump(mode="json")))
    moved = ["teachers.math.urls=['http://x:1']", "teachers.math.service.port=5"]
    check_resume(load_recipe(RECIPE, [*overrides, *moved]))
    with pytest.raises(RecipeError, match="teachers.math.hf is recipes/demo/student but"):
        check_resume(load_recipe(RECIPE, [*overrides, "teachers.math.hf=recipes/demo/student"]))
