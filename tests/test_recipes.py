"""Every recipe for a cluster: it loads, fits, and its layouts run at toy size."""

import os
from pathlib import Path

import pytest
import yaml
from worlds import run_world

from iwopd_megatron.config.load import load_recipe, read_recipe
from iwopd_megatron.config.models import Layout
from iwopd_megatron.config.stages import layers_of_stages
from iwopd_megatron.errors import RecipeError
from iwopd_megatron.hf.families import FAMILIES
from iwopd_megatron.hf.known_models import planning_config
from iwopd_megatron.parity import hf_reference, parity
from iwopd_megatron.parity.rehearse import BUDGET, rehearsals, scaled, scaled_stages, write_model
from iwopd_megatron.plan.plan import plan
from iwopd_megatron.runtime.local_world import local_context
from iwopd_megatron.runtime.parallel import shutdown

RECIPES = sorted(p for p in Path("recipes").glob("*.yaml") if p.name.startswith("qwen3_"))
OTHERS = sorted(  # one pair of each other family
    p for p in Path("recipes").glob("*.yaml") if not p.name.startswith(("qwen3_", "demo_"))
)
PROCESSES = 4


def test_the_papers_pairs_are_all_there():
    pairs = {(r.teacher.hf.name, r.student.hf.name) for r in map(read_recipe, RECIPES)}
    small = ["Qwen3-4B", "Qwen3-1.7B", "Qwen3-0.6B"]
    teachers = ["Qwen3-30B-A3B-Instruct-2507", "Qwen3-4B-Instruct-2507"]
    expected = {(teacher, student) for teacher in teachers for student in small}
    large = {("Qwen3-235B-A22B-Instruct-2507", f"Qwen3-{x}") for x in ("30B-A3B", "235B-A22B")}
    assert pairs == expected | large
    sizes = [read_recipe(path).cluster.gpus for path in RECIPES]
    assert sorted(set(sizes)) == [8, 16, 32, 64, 128, 256]


def test_every_family_has_a_pair():
    students = {planning_config(read_recipe(path).student.hf).model_type for path in OTHERS}
    assert students | {"qwen3", "qwen3_moe"} == set(FAMILIES)


@pytest.mark.parametrize("path", RECIPES + OTHERS, ids=lambda path: path.stem)
@pytest.mark.parametrize("change", [[], ["loss.extrapolation=1.25"]], ids=["iw", "iw_exopd"])
def test_recipe_fits_with_room(path, change):
    found = plan(read_recipe(path, change))
    for role in found.roles:
        assert role.margin > 0.05 * role.capacity, (role.name, role.margin)
    assert found.gpus == sum(sum(node.values()) for node in found.setup.cluster.nodes)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_keeps_the_papers_settings(path):
    recipe = read_recipe(path)
    assert (recipe.loss.weighting.rule, recipe.loss.aggregation) == ("iw", "seq_mean_token_mean")
    assert (recipe.rollout.max_prompt_tokens, recipe.rollout.max_response_tokens) == (2048, 16384)
    assert (recipe.train.prompts_per_round, recipe.train.lr) == (1024, 1e-5)
    assert (recipe.checkpoint.every, recipe.evaluate.every, recipe.loss.tis_cap) == (50, 10, 5.0)
    assert recipe.steps_per_round == 1
    assert recipe.student.dtype == recipe.teacher.dtype == "bf16"


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_states_only_what_differs(path):
    tree = yaml.safe_load(path.read_text())
    bare = {key: tree.pop(key) for key in ("extends",) if key in tree}
    before = read_recipe(path.parent / bare["extends"]) if bare else None
    if before is not None:
        flat = before.model_dump(mode="json")
        _no_repetition(tree, flat, path.name)


def _no_repetition(tree, before, where):
    for key, value in tree.items():
        if isinstance(value, dict) and isinstance(before.get(key), dict) and key != "cluster":
            if key != "parallel":
                _no_repetition(value, before[key], f"{where}.{key}")
        elif key not in ("cluster", "tp"):
            assert before.get(key) != value, f"{where}.{key} is what the base has"


def check_on_this_rank(jobs, queue):
    for name, (folder, reference, rehearsal) in jobs.items():
        layout, recompute = rehearsal.layout, rehearsal.recompute
        result = parity.compare(folder, reference, layout, BUDGET, "fp32", recompute)
        if os.environ["RANK"] == "0":
            queue.put((name, result, parity.failures(result, reference, "fp32")))
    shutdown()


@pytest.fixture(scope="module")
def rehearsed(tmp_path_factory):
    """{rehearsal: problems}: each distinct layout of all recipes once, a world a size."""
    distinct = {
        r for path in RECIPES + OTHERS for r in rehearsals(read_recipe(path), PROCESSES).values()
    }
    jobs = {}
    references = {}
    for i, rehearsal in enumerate(sorted(distinct, key=repr)):
        key = repr(rehearsal.config)
        if key not in references:
            folder = tmp_path_factory.mktemp("toy") / str(i)
            write_model(folder, rehearsal.config)
            reference = hf_reference.compute_reference(folder, rehearsal.samples())
            references[key] = folder, reference
        jobs[rehearsal] = (*references[key], rehearsal)
    found = {}
    for world in sorted({r.processes for r in jobs}):
        queue = local_context().SimpleQueue()
        here = {r: job for r, job in jobs.items() if r.processes == world}
        run_world(world, check_on_this_rank, here, queue, limit=120)
        for _ in here:
            rehearsal, _, problems = queue.get()
            found[rehearsal] = problems
    return found


@pytest.mark.parametrize("path", RECIPES + OTHERS, ids=lambda path: path.stem)
def test_recipes_layouts_run_at_toy_size(path, rehearsed):
    for role, rehearsal in rehearsals(read_recipe(path), PROCESSES).items():
        assert rehearsed[rehearsal] == [], role


def test_layouts_are_scaled_down_and_no_further():
    assert scaled(Layout(tp=2, pp=2), 4) == Layout(tp=2, pp=2)
    assert scaled(Layout(ep=32), 4) == Layout(ep=4)
    assert scaled(Layout(tp=4, ep=8), 4) == Layout(tp=4, ep=4)
    assert scaled(Layout(tp=2, pp=8, vpp=4, ep=16, cp=2), 8).unit <= 8
    assert scaled(Layout(pp=3), 2) == Layout()


UNEVEN = [
    ({"account_for_embedding_in_pipeline_split": True}, [[1, 2], [1, 2, 2, 2]]),
    ({"account_for_loss_in_pipeline_split": True}, [[2, 1], [2, 2, 2, 1]]),
    ({"account_for_embedding_in_pipeline_split": True,
      "account_for_loss_in_pipeline_split": True}, [[2, 1], [1, 2, 2, 1]]),
    ({"num_layers_in_first_pipeline_stage": 4}, [[1, 2], [1, 2, 2, 2]]),
    ({"num_layers_in_first_pipeline_stage": 12, "num_layers_in_last_pipeline_stage": 11},
     [[2, 1], [2, 2, 2, 1]]),
    ({"pipeline_model_parallel_layout": "E|(t*16|)*5t*14|L"}, [[0, 1], [0, 2, 2, 0]]),
]  # fmt: skip


@pytest.mark.parametrize(("settings", "expected"), UNEVEN, ids=str)
def test_uneven_stages_stay_uneven_at_toy_size(settings, expected):
    layers = next(n for n in (95, 94, 88) if fits(Layout(pp=8, **settings), n))
    for limit, stages in zip((2, 4), expected, strict=True):
        axes = scaled(Layout(pp=8, **settings), limit)
        layout, toy = scaled_stages(Layout(pp=8, **settings), layers, axes)
        assert layout.axes == axes.axes == Layout(pp=limit).axes
        assert layers_of_stages(layout, toy) == stages
    alone = scaled(Layout(pp=8, ep=8, **settings), 1)
    assert scaled_stages(Layout(pp=8, **settings), layers, alone) == (Layout(), 2)


def fits(layout, layers):
    try:
        return layers_of_stages(layout, layers)
    except RecipeError:
        return None


def test_the_235b_students_stages_are_uneven_as_planned_and_as_rehearsed():
    recipe = read_recipe(Path("recipes/qwen3_235b_a22b_self.yaml"))
    assert layers_of_stages(recipe.student.parallel, 94) == [11, *[12] * 6, 11]
    toy = rehearsals(recipe, PROCESSES)["student"]
    assert toy.config["num_hidden_layers"] == 3
    assert layers_of_stages(toy.layout, toy.layers) == [2, 1]


def test_a_missing_model_is_named_before_training():
    with pytest.raises(RecipeError, match="folder models/Qwen3-4B does not exist"):
        load_recipe(Path("recipes/qwen3_30b_a3b_to_4b.yaml"))


def write(folder, name, **tree):
    (folder / name).write_text(yaml.safe_dump(tree))
    return folder / name


MINIMAL = {"out": "runs/x", "student": {"hf": "models/Qwen3-4B"}, "data": {"train": "a.jsonl"}}


def test_extends_merges_one_level(tmp_path):
    write(tmp_path, "base.yaml", **MINIMAL, train={"rounds": 7, "lr": 2e-5})
    path = write(tmp_path, "new.yaml", extends="base.yaml", train={"rounds": 9})
    found = read_recipe(path, ["train.seed=4"])
    assert (found.train.rounds, found.train.lr, found.train.seed) == (9, 2e-5, 4)


@pytest.mark.parametrize(
    ("base", "extends", "words"),
    [
        ({**MINIMAL, "extends": "other.yaml"}, "base.yaml", "one level is allowed"),
        (MINIMAL, "missing.yaml", "missing.yaml does not exist"),
        (MINIMAL, ["base.yaml"], "name one YAML file"),
    ],
)
def test_extends_is_refused_in_one_sentence(tmp_path, base, extends, words):
    write(tmp_path, "base.yaml", **base)
    path = write(tmp_path, "new.yaml", extends=extends)
    with pytest.raises(RecipeError, match=words):
        read_recipe(path)
