"""The planner: formulas against numbers worked out by hand, verdicts, search, command."""

import dataclasses
import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from iwopd_megatron.cli.main import app
from iwopd_megatron.config.cluster import Cluster
from iwopd_megatron.config.load import read_recipe
from iwopd_megatron.config.models import Layout
from iwopd_megatron.errors import RecipeError
from iwopd_megatron.hf.known_models import known_model, known_models, planning_config
from iwopd_megatron.plan.activations import in_flight, layer_bytes
from iwopd_megatron.plan.generation import QUANTILES, Generation, Lengths, generate, scored_at
from iwopd_megatron.plan.hardware import FRAGMENTATION, GIB, GPUS, Gpu, Rates
from iwopd_megatron.plan.memory import (
    Memory,
    Precision,
    engine,
    kv_bytes,
    scoring,
    states,
    training,
)
from iwopd_megatron.plan.model_size import ModelSize
from iwopd_megatron.plan.picture import write_picture
from iwopd_megatron.plan.plan import Plan, plan
from iwopd_megatron.plan.search import search, splits
from iwopd_megatron.plan.text import imbalance, notes, overrides
from iwopd_megatron.plan.time import (
    Software,
    Workload,
    _dispatch,
    decode_step,
    forward_backward,
    pipeline,
)
from iwopd_megatron.toy_task import MODELS, write_model

RECIPE = Path("recipes/qwen3_235b_a22b_to_30b_a3b.yaml")
SMALL = Path("recipes/qwen3_30b_a3b_to_4b.yaml")
MOE_30B = ModelSize.of(known_model("Qwen3-30B-A3B"))
TINY = ModelSize(8, 16, 1, 8, 4, 2, 4, 1, 32, False, 0, 1)
TINY_MOE = dataclasses.replace(TINY, experts=4, topk=2)


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("Qwen3-0.6B", 596_049_920), ("Qwen3-1.7B", 1_720_574_976), ("Qwen3-4B", 4_022_468_096),
        ("Qwen3-8B", 8_190_735_360), ("Qwen3-30B-A3B", 30_532_122_624),
        ("Qwen3-235B-A22B", 235_093_634_560),
    ],
)  # fmt: skip
def test_parameters_are_those_of_the_published_models(name, published):
    assert ModelSize.of(known_model(name)).parameters == published


def test_states_of_an_expert_parallel_rank():
    dense, expert = 1_541_093_376, 3_623_878_656  # 48 layers and vocabulary; 16 of 128 experts
    found = states(MOE_30B, Layout(ep=8), 32, Precision(), 0)
    assert found.weights == 2 * (dense + expert)
    assert found.gradients == 4 * (dense + expert)
    assert found.optimizer == 12 * (dense / 32 + expert / 4)
    whole = states(MOE_30B, Layout(ep=8), 32, Precision(), 0, distributed=False)
    assert whole.optimizer == 12 * (dense + expert)


def test_activations_of_a_layer():
    attention = 2 * (16 + 24 + 12) + 4 * (4 + 1 + 1)  # one key-value head: queries are not copied
    assert layer_bytes(TINY, Layout(), "none") == attention + 128 + 4
    assert layer_bytes(TINY, Layout(tp=2), "none") == (attention + 128 + 4) / 2
    assert layer_bytes(TINY, Layout(), "selective") == attention - 4 * 2 + 32 + 4  # no log-sum
    assert layer_bytes(TINY, Layout(), "full") == 16
    dispatch = 4 + 24 * 2  # the norm's factor; two experts a token
    assert layer_bytes(TINY_MOE, Layout(), "none") == attention + 288 + dispatch
    assert layer_bytes(TINY_MOE, Layout(etp=2), "none") == attention + 320 + dispatch


def test_microbatches_in_flight():
    assert [in_flight(Layout(pp=4), stage) for stage in range(4)] == [4, 3, 2, 1]
    assert in_flight(Layout(pp=2, vpp=2), 0) == 2 * (1 + 1 / 4)
    assert in_flight(Layout(pp=2, vpp=2), 1) == 1.5


def test_kv_cache_and_engine():
    assert kv_bytes(MOE_30B, 1) == 2 * 2 * 48 * 4 * 128
    assert kv_bytes(MOE_30B, 4) * 4 == kv_bytes(MOE_30B, 1)
    assert kv_bytes(MOE_30B, 8) == kv_bytes(MOE_30B, 4)  # 4 key-value heads: copied
    found = engine(MOE_30B, 2, GPUS["h100-80"], 0.85)
    assert found.weights == MOE_30B.parameters
    assert found.weights + found.kv_cache == pytest.approx(0.85 * GPUS["h100-80"].memory)
    assert engine(MOE_30B, 1, GPUS["h100-80"], 0.7).kv_cache < 0


def test_total_reserves_more_than_is_allocated_but_not_for_the_cache():
    assert Memory(weights=100, context=10).total == pytest.approx(100 * 1.08 + 10)
    assert Memory(weights=100, kv_cache=50, context=10).total == pytest.approx(100 * 1.08 + 60)


def test_pipeline_bubble():
    assert pipeline(2.0, Layout(pp=4), 6) == 18
    assert pipeline(2.0, Layout(pp=4, vpp=2), 6) == 15


def test_dispatch_crosses_the_network_beyond_a_node():
    gpu = Gpu(1, 1, 1, nvlink=100, network=10)
    size = dataclasses.replace(TINY_MOE, hidden=5, topk=8, experts=16)
    load = Workload(size, Layout(ep=16), gpu, 1, 1, 8, rates=Rates(link=1))
    assert _dispatch(load, 16) == 2 * 80 / 10
    once = dataclasses.replace(load, software=Software(one_copy_a_node=True))
    assert _dispatch(once, 16) == 2 * 20 / 10
    inside = dataclasses.replace(load, layout=Layout(ep=8))
    assert _dispatch(inside, 16) == pytest.approx(2 * 160 * 7 / 8 / 100)


def test_decode_step_reads_weights_and_cache_once():
    gpu = Gpu(1, 1e30, 100.0, 1, 1)
    load = Workload(TINY, Layout(), gpu, 1, 1, rates=Rates(decode_hbm=1, decode_layer=0.5))
    weights = 2 * (8 * 24 + 3 * 8 * 16 + 32 * 8)
    cache = 2 * 2 * 4 * 10 * 3
    assert decode_step(load, 3, 10, 1) == pytest.approx((weights + cache) / 100 + 0.5)


def test_decode_step_reads_only_experts_that_are_chosen():
    load = Workload(MOE_30B, Layout(), GPUS["h100-80"], 1, 1)
    one, many = decode_step(load, 1, 1, 1), decode_step(load, 256, 1, 1)
    assert many - one == pytest.approx(2 * 48 * (128 - 8) * 4_718_592 / (3.35e12 * 0.8), rel=0.02)


def test_recomputation_costs_a_forward_pass():
    load = Workload(MOE_30B, Layout(ep=8), GPUS["h100-80"], 4096, 4096)
    none, full = (forward_backward(load, recompute) for recompute in ("none", "full"))
    assert 1.25 < full / none < 1.34


def step(batch, context):
    return 0.01


def test_generation_with_room_and_without():
    lengths = Lengths((100.0,) * QUANTILES)
    assert generate(step, lengths, 0, 64, 64).seconds == pytest.approx(1.0)
    waiting = generate(step, lengths, 0, 256, 64)
    assert waiting.seconds == pytest.approx(4.0)
    assert waiting.ends[QUANTILES // 2 - 1] == pytest.approx(2.0)


def test_the_long_tail_is_seen():
    lengths = Lengths((100.0,) * (QUANTILES - 1) + (400.0,))
    found = generate(step, lengths, 0, 64, 64)
    assert found.seconds == pytest.approx(4.0)
    assert found.tail == pytest.approx(0.75)


def test_lengths_are_cut_and_have_the_mean():
    lengths = Lengths.lognormal(1000, 16384, 0.5, 1024)
    assert lengths.mean == pytest.approx(1000, rel=0.03)
    cut = Lengths.lognormal(10000, 16384, 0.8, 1024)
    assert max(cut.values) == 16384 and cut.truncated > 0.1


def test_scoring_is_hidden_only_as_far_as_responses_are_there():
    same = Lengths((100.0,) * QUANTILES)
    at_once = Generation((10.0,) * QUANTILES, same)
    assert scored_at(at_once, 0, 5) == pytest.approx(15)
    spread = Generation(tuple(float(i + 1) for i in range(QUANTILES)), same)
    assert scored_at(spread, 0, 6.4) == pytest.approx(64.1)
    assert scored_at(spread, 0, 640) == pytest.approx(641)


@pytest.mark.parametrize(
    ("overrides", "role"),
    [
        (["student.hf=models/Qwen3-235B-A22B", "rollout.servers.tp=8"], "trainer"),
        (["cluster.trainer=8", "student.recompute=none"], "trainer"),
        (["teacher.service.parallel={tp: 4, ep: 4}", "teacher.service.processes=8"], "teacher"),
        (["teacher.service=null", "cluster.teacher=0"], "trainer"),
        (["cluster.gpu=a100", "student.hf=models/Qwen3-235B-A22B", "rollout.servers.tp=4",
          "rollout.servers.start=8"], "rollout"),
    ],
)  # fmt: skip
def test_what_cannot_fit_is_not_said_to_fit(overrides, role):
    found = plan(read_recipe(RECIPE, overrides))
    assert not found.fits
    verdict = next(r for r in found.roles if r.name == role)
    assert not verdict.fits and verdict.knob


def test_a_base_student_is_counted():
    plain, extrapolated = (
        plan(read_recipe(RECIPE, o)).roles[0].memory for o in ([], ["loss.extrapolation=1.25"])
    )
    whole = MOE_30B.share(Layout(ep=8), 0).total * 2
    assert extrapolated.scorer - plain.scorer == whole


def test_an_offloaded_teacher_takes_memory_only_while_it_scores():
    embedded = ["teacher.service=null", "cluster.teacher=0"]
    assert plan(read_recipe(SMALL, embedded)).roles[0].memory.scorer > 50e9
    offloaded = [*embedded, "teacher.offload=true"]
    trains = plan(read_recipe(SMALL, [*offloaded, "teacher.hf=models/Qwen3-0.6B"])).roles[0]
    assert trains.memory.scorer == 0 and trains.memory.activations > 6e9
    scores = plan(read_recipe(SMALL, offloaded)).roles[0]
    assert scores.memory.scorer == 2 * 30_532_122_624 and scores.memory.activations < 3.1e9
    assert scores.memory.optimizer == trains.memory.optimizer and not scores.fits


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["cluster.trainer=20"], "does not fill whole nodes"),
        (["rollout.servers.start=3"], "write start=4"),
        (["teacher.service.processes=16"], "write processes=8"),
        (["student.parallel.ep=7"], "ep=7 does not divide"),
        (["student.parallel.ep=16", "cluster.trainer=24"], "not a multiple of 16"),
        (["student.hf=models/none"], "is no model known here"),
    ],
)
def test_impossible_plans_are_one_sentence(overrides, words):
    with pytest.raises(RecipeError, match=words):
        plan(read_recipe(RECIPE, overrides))


def test_known_models_are_accepted_as_config_json(tmp_path):
    for name, config in known_models().items():
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(config))
        assert planning_config(folder) == planning_config(Path("models") / name)


def test_a_round_adds_up():
    found = plan(read_recipe(RECIPE))
    last = found.phases[-1]
    assert found.seconds == pytest.approx(last.start + last.seconds)
    by_name = {phase.name: phase for phase in found.phases}
    assert by_name["scoring"].start + by_name["scoring"].seconds == pytest.approx(
        by_name["forward/backward"].start
    )
    stale = plan(read_recipe(RECIPE, ["rollout.max_staleness=1"]))
    assert stale.seconds < found.seconds
    steps = plan(read_recipe(RECIPE, ["train.minibatches=4"]))
    assert "old log-probs" in {phase.name for phase in steps.phases}
    rounds = read_recipe(RECIPE, ["train.rounds=334"])
    assert plan(rounds).gpu_hours == pytest.approx(2 * found.gpu_hours, rel=0.01)


def test_nodes_hold_whole_roles_and_shared_ones():
    assert Cluster(trainer=16, teacher=2, rollout=6).nodes == [
        {"trainer": 8},
        {"trainer": 8},
        {"rollout": 6, "teacher": 2},
    ]
    assert Cluster(trainer=3, teacher=1, rollout=4).nodes == [
        {"rollout": 4, "trainer": 3, "teacher": 1}
    ]


def test_splits_use_all_gpus():
    for total in (8, 16, 64):
        found = list(splits(Cluster(trainer=4, teacher=1, rollout=3), total))
        assert found and all(c.gpus == total and not c.uneven_roles for c in found)


def test_search_finds_what_is_at_least_as_fast_and_its_overrides_say_how():
    now = plan(read_recipe(SMALL))
    best = search(now)[0]
    assert best.fits and best.seconds <= now.seconds * 1.001
    words = [word.replace("'", "") for word in overrides(best)]
    again = plan(read_recipe(SMALL, words))
    assert again.seconds == pytest.approx(best.seconds)


@pytest.mark.parametrize(("gpus", "first"), [(1024, "long tail"), (10240, "prompts_per_round")])
def test_scale_on_paper_names_what_breaks_first(gpus, first):
    found: Plan = search(plan(read_recipe(RECIPE)), gpus, layouts=False)[0]
    assert found.gpus == gpus
    assert first in " ".join(found.limits())
    more = plan(read_recipe(RECIPE, ["train.prompts_per_round=262144"]))
    more = search(more, gpus, layouts=False)[0]
    assert more.tokens_per_second > 5 * found.tokens_per_second


def test_more_gpus_help_less_and_less():
    now = plan(read_recipe(RECIPE))
    seconds = [search(now, gpus, layouts=False)[0].seconds for gpus in (64, 128, 256)]
    assert seconds[0] > seconds[1] > seconds[2] > seconds[0] / 4


@pytest.mark.parametrize("suffix", [".png", ".html"])
def test_picture(tmp_path, suffix):
    file = tmp_path / f"plan{suffix}"
    write_picture(plan(read_recipe(RECIPE)), file)
    head = {".png": b"\x89PNG", ".html": b"<!doctype html>"}[suffix]
    assert file.read_bytes().startswith(head) and file.stat().st_size > 20_000


def run(*words):
    return CliRunner().invoke(app, ["plan", *words])


def test_command_prints_figures_and_fails_where_it_does_not_fit():
    found = run(str(RECIPE), "--json")
    figures = json.loads(found.stdout)
    assert found.exit_code == 0 and figures["fits"]
    assert set(figures["roles"]) == {"trainer", "teacher", "rollout"}
    parts = figures["roles"]["trainer"]["memory"]
    assert {"weights", "gradients", "optimizer", "activations"} <= set(parts)
    assert run(str(RECIPE), "cluster.trainer=8", "student.recompute=none").exit_code == 1
    larger = json.loads(run(str(RECIPE), "--gpus", "128", "--gpu", "h200", "--json").stdout)
    assert larger["gpus"] == 128 and larger["gpu"] == "h200"
    assert "proposals" in json.loads(run(str(SMALL), "--search", "--json").stdout)
    text = run(str(SMALL)).stdout
    assert "GPU-hours" in text and "breaks first" in text


def test_a_rank_with_twice_the_tokens_of_experts_is_said_to_need_more():
    found = plan(read_recipe(RECIPE))
    needed = dict((role.name, more) for role, more in imbalance(found))
    rows = found.setup.recipe.train.microbatch_tokens * MOE_30B.topk
    # outputs in both orders, the copies as received, and what the layer saves
    expected = rows * 2 * (4 * MOE_30B.hidden + 3 * MOE_30B.ffn) * FRAGMENTATION
    assert needed["trainer"] == pytest.approx(expected)
    assert set(needed) == {"trainer", "teacher"}
    said = next(line for line in notes(found) if "twice the tokens" in line)
    assert f"trainer {expected / GIB:+.1f} GiB" in said
    assert not imbalance(plan(read_recipe(SMALL)))


def test_a_proposals_line_makes_its_plan():
    found = run(str(RECIPE), "--search").stdout
    table, lines = found.split("proposals, fastest round first")[1].split("1: cluster.")
    words = shlex.split("cluster." + lines.split("\n")[0])
    planned = json.loads(run(str(RECIPE), *words, "--json").stdout)
    assert planned["fits"] and f"│ 1 │ {planned['round']['seconds']:.0f} " in table


@pytest.mark.parametrize("path", sorted(Path("recipes").glob("*.yaml")), ids=lambda p: p.stem)
def test_every_recipe_can_be_planned(path, tmp_path):
    found = run(str(path), "--picture", str(tmp_path / "plan.png"))
    assert found.exit_code == 0, found.exception
    cluster = read_recipe(path).cluster
    assert ("(assumed)" in found.stdout.replace("average (assumed)", "")) == (cluster is None)


def test_gpus_that_a_recipe_does_not_give_are_said():
    figures = json.loads(run("recipes/demo_sglang.yaml", "--json").stdout)
    assert [line.split(",")[0] for line in figures["assumed"]] == [
        "cluster.trainer=2",
        "cluster.teacher=1",
        "cluster.rollout=1",
    ]
    assert figures["gpus"] == 4 and {"teacher", "rollout"} <= set(figures["roles"])


def test_the_toy_task_is_planned_as_it_is_written(tmp_path):
    folder = tmp_path / "toy_task"
    for name in MODELS:
        before = ModelSize.of(planning_config(folder / name))
        write_model(folder / name, name)
        assert ModelSize.of(planning_config(folder / name)) == before


def test_command_refuses_unknown_gpus_and_pictures():
    assert "choose one of h100-80" in str(run(str(RECIPE), "--gpu", "v100").exception)
    assert ".html" in str(run(str(RECIPE), "--picture", "x.svg").exception)


def test_planning_and_launching_need_no_numerical_packages():
    """They run in an environment that has none (cluster/requirements.txt)."""
    code = f"""
import sys
from pathlib import Path
from iwopd_megatron.cli import main as cli
from iwopd_megatron.launch import launch
from iwopd_megatron.plan import search as plan_search
from iwopd_megatron.plan.plan import plan
from iwopd_megatron.config.load import read_recipe
from iwopd_megatron.toy_task import MODELS, write_model
plan_search.search(plan(read_recipe(Path({str(SMALL)!r}))))
assert not {{"torch", "numpy", "transformers", "datasets", "matplotlib"}} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_predictions_stay_within_the_aims_of_what_was_published():
    out = subprocess.run([sys.executable, "bench/plan.py"], check=True, capture_output=True)
    figures = json.loads(out.stdout.splitlines()[-1])
    assert figures["held_out_anchors"] >= 20
    assert figures["median_abs_error_memory"] < 0.15
    assert figures["median_abs_error_throughput"] < 0.25


def test_training_picks_the_busier_end_of_a_pipeline():
    size = dataclasses.replace(MOE_30B, vocab=10**6)  # a head that outweighs what is in flight
    found = training(size, Layout(pp=2, ep=8), 16, 4096, "full")
    assert found.head > 0
    assert scoring(MOE_30B, Layout(ep=8), 4096).weights == 2 * MOE_30B.share(Layout(ep=8), 0).total


def test_a_pruned_model_is_known_by_its_name():
    whole, pruned = (planning_config(Path("models") / f"Llama-3.1-8B{x}") for x in ("", "-24L"))
    assert pruned == dataclasses.replace(whole, num_hidden_layers=24)
    with pytest.raises(RecipeError, match="'Llama-9-24L' is no model known here"):
        planning_config(Path("models/Llama-9-24L"))
