"""A recipe's further settings of Megatron: what is passed on, what is refused, what stops a run."""

import dataclasses
from importlib.metadata import version

import pytest
import torch
from packaging.version import Version
from worlds import run_world

from iwopd_megatron.config.load import parse_tree
from iwopd_megatron.config.models import Layout, MegatronSettings, Student
from iwopd_megatron.errors import GateError, RecipeError
from iwopd_megatron.hf.config import read_hf_config
from iwopd_megatron.models import passed_on
from iwopd_megatron.models.gpt import build_model, transformer_config
from iwopd_megatron.runtime.megatron import MoELayer, TransformerConfig
from iwopd_megatron.runtime.parallel import initialise, packed_seq_params, shutdown
from iwopd_megatron.weights.hf_reader import HfTensors, load_shards


def student(**settings) -> Student:
    return parse_tree({"hf": "x", "megatron": settings}, Student, "recipe")


def refusal(function, *args) -> str:
    with pytest.raises(RecipeError) as error:
        function(*args)
    assert "\n" not in str(error.value) and str(error.value).endswith((".", "?"))
    return str(error.value)


@pytest.mark.parametrize("name", ["cuda_graph_impl", "enable_cuda_graph", "external_cuda_graph"])
def test_cuda_graphs_are_refused_with_the_reason(name):
    assert "one length" in refusal(lambda: student(**{name: "local"}))


def test_an_unknown_setting_is_refused_with_the_nearest():
    said = refusal(lambda: student(moe_page_stash=True))
    assert "did you mean 'moe_paged_stash'" in said


def test_settings_are_those_of_the_newest_megatron():
    if Version(version("megatron-core")) < Version("0.19"):
        pytest.skip("an older Megatron lacks some")
    known = {field.name for field in dataclasses.fields(TransformerConfig)}
    assert set(MegatronSettings.model_fields) <= known


def test_a_setting_that_this_megatron_lacks_is_refused(monkeypatch):
    monkeypatch.setattr(passed_on, "TransformerConfig", dataclasses.make_dataclass("Older", []))
    said = refusal(passed_on.check_settings, student(moe_permute_fusion=True))
    assert "no setting of Megatron-Core" in said and "moe_permute_fusion" in said


@pytest.mark.parametrize(
    "settings", [{"moe_token_dispatcher_type": "flex"}, {"moe_permute_fusion": True}]
)
def test_what_needs_a_gpu_is_refused_without_one(settings):
    assert "needs TransformerEngine" in refusal(passed_on.check_settings, student(**settings))


def test_a_dispatcher_that_runs_anywhere_is_not():
    passed_on.check_settings(student(moe_token_dispatcher_type="allgather"))


def test_what_megatron_refuses_is_one_sentence(moe_folder):
    further = {"moe_pad_expert_input_to_capacity": True}
    said = refusal(
        transformer_config, read_hf_config(moe_folder), Layout(), "fp32", "none", further
    )
    assert said.startswith("Megatron-Core refuses student.megatron: moe_expert_capacity_factor")


def hidden_states(folder, parallel, further):
    hf = read_hf_config(folder)
    chunks = build_model(hf, parallel, further=further)
    load_shards(chunks, HfTensors(folder), hf, parallel)
    dispatchers = {
        type(x.token_dispatcher).__name__ for x in chunks[0].modules() if isinstance(x, MoELayer)
    }
    ids = torch.arange(32)[None] + 32 * parallel.ep.rank
    packed = packed_seq_params([32])
    return chunks[0](ids, torch.arange(32)[None], None, packed_seq_params=packed), dispatchers


def compare_dispatchers(folder):
    parallel = initialise(Layout(ep=2))
    expected, plain = hidden_states(folder, parallel, None)
    found, other = hidden_states(folder, parallel, {"moe_token_dispatcher_type": "allgather"})
    shutdown()
    assert plain == {"MoEAlltoAllTokenDispatcher"} and other == {"MoEAllGatherTokenDispatcher"}
    assert torch.allclose(found, expected, rtol=0, atol=1e-5)


def test_a_setting_reaches_megatron_and_leaves_the_numbers(moe_folder):
    run_world(2, compare_dispatchers, moe_folder)


def lose(folder):
    (chunk,) = build_model(read_hf_config(folder), initialise(Layout()))
    layers = [x for x in chunk.modules() if isinstance(x, MoELayer)]
    for layer in layers:
        layer.token_dispatcher.check_over_budget = lambda: None
    passed_on.check_paged_stash_overflow = lambda: torch.tensor([True])
    passed_on.check_room([chunk])  # neither is asked for without a budget
    chunk.config.moe_expert_rank_capacity_factor = 1.5
    with pytest.raises(GateError, match="paged stash was too small"):
        passed_on.check_room([chunk])
    layers[-1].token_dispatcher.check_over_budget = lambda: torch.tensor([True])
    with pytest.raises(GateError, match="more tokens went to a rank's experts"):
        passed_on.check_room([chunk])
    shutdown()


def test_lost_tokens_and_activations_stop_the_run(moe_folder):
    run_world(1, lose, moe_folder)
