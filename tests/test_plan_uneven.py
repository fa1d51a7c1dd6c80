"""The planner on pipelines of unequal stages: figures worked out by hand, and what it proposes."""

import dataclasses
import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from iwopd_megatron.cli.main import app
from iwopd_megatron.config.load import read_recipe
from iwopd_megatron.config.models import Layout
from iwopd_megatron.config.stages import layers_of_stages
from iwopd_megatron.hf.known_models import known_model
from iwopd_megatron.plan.activations import activation_bytes, layer_bytes, layers_in_flight
from iwopd_megatron.plan.hardware import GPUS
from iwopd_megatron.plan.memory import Precision, scoring, states, training
from iwopd_megatron.plan.model_size import ModelSize
from iwopd_megatron.plan.plan import plan
from iwopd_megatron.plan.search import search
from iwopd_megatron.plan.text import overrides
from iwopd_megatron.plan.time import Workload, _head, _layer, forward, optimizer_step

pytestmark = pytest.mark.usefixtures("in_the_repository")
BOTH = {
    "account_for_embedding_in_pipeline_split": True, "account_for_loss_in_pipeline_split": True,
}  # fmt: skip
STRING = "pipeline_model_parallel_layout"
SELF = Path("recipes/qwen3_235b_a22b_self.yaml")
MOE_235B = ModelSize.of(known_model("Qwen3-235B-A22B"))
DENSE = ModelSize(8, 16, 8, 8, 4, 2, 4, 1, 32, False, 0, 1)


def test_a_stage_has_the_parameters_of_its_layers():
    layout = Layout(pp=8, ep=8, **BOTH)
    layer = MOE_235B.attention + MOE_235B.norms + MOE_235B.router
    ends = {0: MOE_235B.vocabulary, 7: MOE_235B.vocabulary + MOE_235B.hidden}
    for stage in range(8):
        share, layers = MOE_235B.share(layout, stage), 11 if stage in ends else 12
        assert share.dense == layers * layer + ends.get(stage, 0)
        assert share.expert == layers * 128 * MOE_235B.mlp / 8
    whole = sum(MOE_235B.share(Layout(pp=8, **BOTH), stage).total for stage in range(8))
    assert whole == MOE_235B.parameters


def test_layers_in_flight_are_those_of_the_chunks_that_wait():
    found = [layers_in_flight(DENSE, Layout(pp=4, **{STRING: "E|t*3|t*4|tL"}), s) for s in range(4)]
    assert found == [0, 3 * 3, 2 * 4, 1]
    # Stage 0 waits for 2 + 2 + 1 passes: 2 of its first chunk, 2 of its second, 1 of the first
    uneven = Layout(pp=2, vpp=2, **{STRING: "E|t*3|t*4|tL"})
    assert layers_in_flight(DENSE, uneven, 0) == 2 * 0 + 2 * 4 + 1 * 0
    assert layers_in_flight(DENSE, uneven, 1) == 2 * 3 + 1 * 1
    even = Layout(pp=2, vpp=2)
    assert [layers_in_flight(DENSE, even, stage) for stage in (0, 1)] == [5 * 2, 3 * 2]
    kept = activation_bytes(DENSE, uneven, 100, "none", 0)
    bare = activation_bytes(DENSE, Layout(pp=2, **{STRING: "E|t*8L"}), 100, "none", 0)
    more = 8 * layer_bytes(DENSE, uneven, "none") + (2.5 - 2) * 2 * DENSE.hidden  # and its output
    assert [a - b for a, b in zip(kept, bare, strict=True)] == pytest.approx([more * 100] * 2)


def test_the_busiest_stage_may_be_between_the_ends():
    size = dataclasses.replace(DENSE, hidden=64, ffn=256, queries=64, keys=32, head=32)
    middle = Layout(pp=4, **{STRING: "Et|t*5|t|tL"})
    weights = [states(size, middle, 4, Precision(), stage).weights for stage in range(4)]
    assert max(weights) == weights[1]
    assert training(size, middle, 4, 64).weights == scoring(size, middle, 64).weights == weights[1]
    assert training(size, middle, 4, 64).head == 0
    late = Layout(pp=4, **{STRING: "Et|t|t|t*5L"})
    last = states(size, late, 4, Precision(), 3).weights
    assert training(size, late, 4, 64).weights == last


def test_the_slowest_stage_is_the_fullest_or_the_last_with_the_head():
    load = Workload(MOE_235B, Layout(pp=8, ep=8, **BOTH), GPUS["h100-80"], 20480, 4000)
    layer, head = _layer(load, 1, None), _head(load, 1)
    assert head > layer
    assert forward(load) == pytest.approx(11 * layer + head)
    light = dataclasses.replace(load, layout=Layout(pp=8, ep=8, **{STRING: "E|(t*16|)*5t*14|L"}))
    assert forward(light) == pytest.approx(16 * layer)
    assert optimizer_step(light, 128) > 1.3 * optimizer_step(load, 128)


def test_search_proposes_uneven_stages_where_layers_do_not_divide():
    now = plan(read_recipe(SELF))
    best = search(now)[0]
    assert best.fits and best.seconds < now.seconds
    layout = best.setup.layout
    assert layout.pp > 2 and max(layers_of_stages(layout, 94)) < 94 / layout.pp + 1
    flow = next(word for word in overrides(best) if word.startswith("student.parallel="))
    again = plan(read_recipe(SELF, [word.replace("'", "") for word in overrides(best)]))
    assert layout.placement and all(f"{name}: " in flow for name in layout.placement)
    assert again.setup.layout.placement == layout.placement
    assert again.seconds == pytest.approx(best.seconds)


def test_search_keeps_an_embedded_teacher_in_mind():
    """The student's 36 layers may be dealt out in ways that the teacher's 48 cannot."""
    words = ["teacher.service=null", "teacher.hf=models/Qwen3-30B-A3B", "cluster.teacher=0"]
    now = plan(read_recipe(Path("recipes/qwen3_4b_to_4b_32gpu.yaml"), words))
    found = search(now, 32)
    assert found and all(layers_of_stages(plan.setup.layout, 48) for plan in found)


def test_the_command_says_which_stages_there_are():
    found = CliRunner().invoke(app, ["plan", str(SELF)])
    assert found.exit_code == 0 and "student: stages of 11, 6 x 12, 11 layers" in found.stdout
    found = CliRunner().invoke(app, ["plan", str(SELF), "--json"])
    assert json.loads(found.stdout)["stages"] == {"student": [11, *[12] * 6, 11]}
    even = CliRunner().invoke(app, ["plan", "recipes/qwen3_4b_to_4b.yaml", "--json"])
    assert "stages" not in json.loads(even.stdout)
