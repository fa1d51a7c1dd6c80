"""Which layers are where: the torch-free function against Megatron's own, on every rank.

Megatron's functions read a rank's place from its process groups; its own setters give it here.
"""

from dataclasses import replace
from itertools import product

import pytest
from worlds import run_world

from iwopd_megatron.config.models import Layout
from iwopd_megatron.config.preflight import check_layout
from iwopd_megatron.config.stages import (
    distinct_stages,
    layers_of_stages,
    stage_layers,
    with_stages,
)
from iwopd_megatron.errors import RecipeError
from iwopd_megatron.hf.config import read_hf_config
from iwopd_megatron.hf.known_models import known_model
from iwopd_megatron.models.gpt import build_model, transformer_config
from iwopd_megatron.runtime.megatron import get_num_layers_to_build, mpu
from iwopd_megatron.runtime.parallel import initialise

# isort: split
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

HF = known_model("Qwen3-0.6B")
EMBEDDING, LOSS = (f"account_for_{what}_in_pipeline_split" for what in ("embedding", "loss"))
FIRST, LAST = (f"num_layers_in_{which}_pipeline_stage" for which in ("first", "last"))
STRING = "pipeline_model_parallel_layout"
SETTINGS = [
    {},
    {EMBEDDING: True},
    {LOSS: True},
    {EMBEDDING: True, LOSS: True},
    *({FIRST: first} for first in (1, 2, 4, 9)),
    *({LAST: last} for last in (1, 2, 4, 9)),
    *({FIRST: first, LAST: last} for first, last in product((1, 2, 4, 9), repeat=2)),
    {FIRST: 2, LOSS: True},
]
# Read as Megatron reads them: multiplied, in groups, with commas. (pp, vpp, layers) of each.
STRINGS = {
    "Et|tL": (2, 1, 2), "E|ttL": (2, 1, 2), "Ett|L": (2, 1, 2), "E|tt|L": (3, 1, 2),
    "Et*3|(tt|)*2,t*3L": (2, 2, 10), "E|(tt|)*2,(t|)*4,L": (2, 4, 8), "E,t|t,L": (2, 1, 2),
    "(Et|)*1(t|)*2tL": (4, 1, 4), "Et|(t|)*5tL": (7, 1, 7), "E|t|t|L": (2, 2, 2),
    "Et*12|t*11L": (2, 1, 23), "EttL": (1, 1, 2), "(E|tt)*1|L": (3, 1, 2),
}  # fmt: skip
# Of these Megatron takes some: it has embedding and LM head on the ends' chunks all the same.
NO_STRINGS = [
    "|Ett|tL", "Ett|tL|", "Et||ttL", "EtL|tt", "tE|ttL", "Ett|Lt", "Et|tt", "tt|tL", "Et|mttL",
    "Ett|xtL", "Et|EttL", "",
]  # fmt: skip


def megatron_layers(layout: Layout, layers: int):
    """The layers that Megatron's own functions give every stage and chunk, asked rank by rank."""
    hf = replace(HF, num_hidden_layers=layers)
    mpu.set_pipeline_model_parallel_world_size(layout.pp)
    mpu.set_virtual_pipeline_model_parallel_world_size(layout.vpp if layout.vpp > 1 else None)
    config = transformer_config(hf, layout)
    found = []
    for rank in range(layout.pp):
        mpu.set_pipeline_model_parallel_rank(rank)
        chunks = []
        for chunk in range(layout.vpp):
            vp_stage = chunk if layout.vpp > 1 else None
            offset = get_transformer_layer_offset(config, vp_stage)
            chunks.append(range(offset, offset + get_num_layers_to_build(config, vp_stage)))
        found.append(tuple(chunks))
    return tuple(found)


@pytest.fixture(autouse=True)
def _no_ranks_afterwards():
    yield
    mpu.set_pipeline_model_parallel_world_size(None)
    mpu.set_virtual_pipeline_model_parallel_world_size(None)
    mpu.set_pipeline_model_parallel_rank(None)


def tiles(found, layout: Layout, layers: int) -> bool:
    """Whether every layer is there once, in the network's order."""
    order = [found[stage][chunk] for chunk in range(layout.vpp) for stage in range(layout.pp)]
    return [layer for chunk in order for layer in chunk] == list(range(layers))


def agrees(layout: Layout, layers: int) -> bool | None:
    """Whether Megatron says the same of a layout that is taken; None for one that is refused.

    A refused one must be one that Megatron refuses, or fails at, or loses layers of.
    """
    try:
        ours = stage_layers(layout, layers)
    except RecipeError as error:
        assert str(error).endswith(".") and len(str(error)) < 400
        if layout.pp == 1:  # settings of stages have no meaning there
            return None
        try:
            theirs = megatron_layers(layout, layers)
        except (AssertionError, ValueError, ZeroDivisionError):
            return None
        assert not tiles(theirs, layout, layers)
        return None
    assert tiles(ours, layout, layers)
    return ours == megatron_layers(layout, layers)


@pytest.mark.parametrize("pp", [1, 2, 3, 4, 6])
@pytest.mark.parametrize("vpp", [1, 2, 3])
def test_settings_mean_what_they_mean_to_megatron(pp, vpp):
    found = [
        agrees(Layout(pp=pp, vpp=vpp, **settings), layers)
        for settings in SETTINGS
        for layers in (1, 4, 6, 10, 11, 12, 22, 24, 94)
    ]
    assert False not in found
    assert True in found or pp == 1 < vpp


@pytest.mark.parametrize("text", STRINGS)
def test_a_layout_string_means_what_it_means_to_megatron(text):
    pp, vpp, layers = STRINGS[text]
    layout = Layout(pp=pp, vpp=vpp, **{STRING: text})
    assert stage_layers(layout, layers) == megatron_layers(layout, layers)
    for other in (Layout(pp=pp + 1, vpp=vpp, **{STRING: text}), layout):
        with pytest.raises(RecipeError):
            stage_layers(other, layers + 1)


@pytest.mark.parametrize("text", NO_STRINGS)
def test_a_layout_string_of_other_stages_than_megatron_builds_is_refused(text):
    for pp, vpp in ((1, 1), (2, 1), (3, 1), (2, 2)):
        with pytest.raises(RecipeError, match="^pipeline_model_parallel_layout (has|must|places)"):
            stage_layers(Layout(pp=pp, vpp=vpp, **{STRING: text}), 3)


@pytest.mark.parametrize("layers", [28, 36, 40, 48, 94])
def test_the_proposed_settings_are_taken_and_leave_no_stage_fuller_than_need_be(layers):
    proposed = 0
    for pp, vpp in product((1, 2, 3, 4, 5, 8, 16, 32), (1, 2, 3, 4)):
        layout = with_stages(Layout(tp=2, pp=pp, vpp=vpp, ep=4, **{LOSS: True}), layers)
        if layout is None:
            assert pp * vpp > layers or pp == 1 < vpp
            continue
        proposed += 1
        assert layout.axes == Layout(tp=2, pp=pp, vpp=vpp, ep=4).axes
        assert bool(layout.placement) is bool(layers % (pp * vpp))
        assert stage_layers(layout, layers) == megatron_layers(layout, layers)
        assert max(layers_of_stages(layout, layers)) <= -(-layers // (pp * vpp)) * vpp
    assert proposed > 15


def test_qwen3_235b_at_pipelines_that_clusters_run():
    both = {EMBEDDING: True, LOSS: True}
    assert with_stages(Layout(pp=8), 94) == Layout(pp=8, **both)
    assert layers_of_stages(Layout(pp=8, **both), 94) == [11, *[12] * 6, 11]
    assert layers_of_stages(Layout(pp=16, **both), 94) == [5, *[6] * 14, 5]
    assert layers_of_stages(Layout(pp=8, **{FIRST: 11, LAST: 11}), 94) == [11, *[12] * 6, 11]
    assert distinct_stages(Layout(pp=8, **both), 94) == [0, 1, 7]
    assert distinct_stages(Layout(pp=4, **{FIRST: 2}), 8) == [0, 1, 3]
    assert distinct_stages(Layout(), 4) == [0] and distinct_stages(Layout(pp=2), 4) == [0, 1]


BUILT = {
    2: [
        {"pp": 2, FIRST: 1}, {"pp": 2, STRING: "E|t*4L"}, {"pp": 2, STRING: "Et*4|L"},
        {"pp": 2, "vpp": 3, EMBEDDING: True, LOSS: True}, {"pp": 2, "vpp": 2, STRING: "E|t*3|t|L"},
    ],
    3: [{"pp": 3, EMBEDDING: True, LOSS: True}, {"pp": 3, FIRST: 1, LAST: 2}],
}  # fmt: skip


def check_what_is_built(layouts, folder) -> None:
    hf = read_hf_config(folder)
    for axes in layouts:
        parallel = initialise(Layout(**axes))
        stages = stage_layers(parallel.layout, hf.num_hidden_layers)
        chunks = build_model(hf, parallel)
        for chunk, layers in zip(chunks, stages[parallel.pp.rank], strict=True):
            assert [layer.layer_number - 1 for layer in chunk.decoder.layers] == list(layers)
        has = [(hasattr(c, "embedding"), c.decoder.final_layernorm is not None) for c in chunks]
        is_first = parallel.pp.rank == 0
        expected = [(is_first and c is chunks[0], False) for c in chunks]
        if parallel.is_last_stage:
            expected[-1] = (is_first and len(chunks) == 1, True)
        assert has == expected


@pytest.mark.parametrize("world", BUILT)
def test_a_world_builds_what_the_function_says(world, dense_folder):
    run_world(world, check_what_is_built, BUILT[world], dense_folder)


REFUSED = [
    (dict(pp=8), 94, f"pp x vpp=8 does not divide num_hidden_layers (94); write {EMBEDDING}=true "
     f"and {LOSS}=true, or use pp x vpp of 1, 2, 47."),
    (dict(pp=8, vpp=5), 94, f"write {STRING}=Et*2|(t*3|)*14(t*2|)*24t*2L, or use"),
    (dict(pp=8), 36, f"write {FIRST}=3 and {LAST}=3, or use"),
    (dict(pp=8), 4, "(4); use pp x vpp of 1, 2, 4."),
    ({"pp": 2, LOSS: True}, 94, "num_hidden_layers (94) with account_for_loss_in_pipeline_split "
     "(95); leave it out."),
    ({"pp": 3, FIRST: 1, LAST: 3}, 4, f"{FIRST}=1 and {LAST}=3 leave 0 of 4 layers to 1 stages"),
    ({"pp": 2, "vpp": 2, FIRST: 4, LAST: 4}, 8, "leave no stage of pp=2; write one of them."),
    ({"pp": 1, FIRST: 4}, 4, "need pp >= 2; leave them out."),
    ({"pp": 2, FIRST: 1, LOSS: True}, 4, "count layers alone; leave"),
    ({"pp": 2, STRING: "Ett|ttL", LOSS: True}, 4, f"places every layer; leave {LOSS} out."),
    ({"pp": 2, STRING: "Ett|tmL"}, 4, "has 'm', which is no E (embedding), t (layer) or L"),
    ({"pp": 2, STRING: "Et|tt|tL"}, 4, "has 3 stages, pp x vpp=2; write as many, cut by |."),
    ({"pp": 2, STRING: "Et|tL"}, 4, "places 2 layers (t), num_hidden_layers is 4; write as many."),
    ({"pp": 2, "vpp": 2, STRING: "|Et|t|tL"}, 3, "must begin its first stage with the one E"),
    ({"pp": 2, "vpp": 2, STRING: "Et||t|tL"}, 3, "has a stage with nothing in it; give every one"),
]  # fmt: skip


@pytest.mark.parametrize(("settings", "layers", "words"), REFUSED, ids=str)
def test_refused_in_one_sentence(settings, layers, words):
    with pytest.raises(RecipeError) as error:
        check_layout(Layout(**settings), replace(HF, num_hidden_layers=layers), "student")
    message = str(error.value)
    assert message.startswith("student: ") and words in message
    assert message.endswith(".") and "\n" not in message and len(message) < 400
