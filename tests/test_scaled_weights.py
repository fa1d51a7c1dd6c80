"""FP8 weights with scales are read as the plain weights they stand for, slice by slice."""

import json
import math
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from scaled_folders import (
    FP8_CONFIG,
    add_layer_after_last,
    compressed_tensors_config,
    write_latents,
    write_scaled,
)
from worlds import run_world

from iwopd_megatron.config.load import read_recipe
from iwopd_megatron.config.models import Layout
from iwopd_megatron.config.preflight_rollout import check_rollout
from iwopd_megatron.errors import RecipeError
from iwopd_megatron.hf.config import read_hf_config
from iwopd_megatron.hf.known_models import planning_config
from iwopd_megatron.models.gpt import build_model
from iwopd_megatron.parity.check import compare, read_side
from iwopd_megatron.parity.hf_reference import hf_model
from iwopd_megatron.plan.model_size import ModelSize
from iwopd_megatron.runtime.parallel import initialise, shutdown
from iwopd_megatron.weights.convert import hf_to_megatron, megatron_to_hf
from iwopd_megatron.weights.hf_reader import HfTensors, load_shards
from iwopd_megatron.weights.hf_writer import save_folder
from iwopd_megatron.weights.table import weight_blocks

BF16 = torch.bfloat16
# how they are scaled: block, quantization_config, name of the scales, their dtype
KINDS = {
    "block": ((16, 32), FP8_CONFIG | {"weight_block_size": [16, 32]}, "weight_scale_inv", BF16),
    # 24 divides neither 64 nor 32: the last block of rows and of columns is smaller
    "ragged block": ((24, 24), FP8_CONFIG | {"weight_block_size": [24, 24]}, "weight_scale_inv",
                     torch.float32),
    "tensor": ((0, 0), FP8_CONFIG | {"weight_block_size": None}, "weight_scale_inv", torch.float32),
    "rows": ((1, 0), compressed_tensors_config(strategy="channel"), "weight_scale", BF16),
    "compressed block": (
        (16, 16), compressed_tensors_config(strategy="block", block_structure=[16, 16]),
        "weight_scale", torch.float32),
    "groups": ((1, 16), compressed_tensors_config(strategy="group", group_size=16),
               "weight_scale", torch.float32),
    # as released folders of DeepSeek-V3; of its sizes only 576 rows are no multiple of 128
    "latents": ((128, 128), FP8_CONFIG | {"weight_block_size": [128, 128]}, "weight_scale_inv",
                torch.float32),
}  # fmt: skip


@pytest.fixture(scope="module", params=KINDS)
def pair(request, moe_folder, tmp_path_factory):
    """(a folder with scaled weights, its twin with plain ones)"""
    folder, has_latents = tmp_path_factory.mktemp("scaled"), request.param == "latents"
    source = write_latents(folder / "source") if has_latents else moe_folder
    write_scaled(source, folder / "fp8", folder / "twin", *KINDS[request.param])
    if has_latents:
        add_layer_after_last(folder / "fp8")
    return folder / "fp8", folder / "twin"


def expected(folder, dtype):
    """The twin's weights; compressed-tensors rounds a product to the scale's dtype first."""
    rounds = "compressed" in (folder / "config.json").read_text()
    stored = load_file(folder / "model.safetensors")
    out = load_file(folder.parent / "twin" / "model.safetensors")
    for name in out:
        scale = stored.get(name.removesuffix("weight") + "weight_scale")
        if rounds and scale is not None:
            out[name] = out[name].to(scale.dtype)
    return {name: weight.to(dtype).float() for name, weight in out.items()}


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
def test_whole_tensors_are_those_of_the_twin(pair, dtype):
    twin = expected(pair[0], dtype)
    found = HfTensors(pair[0], scaled_dtype=dtype)
    assert found.keys() == twin.keys()
    for name, weight in twin.items():
        assert torch.equal(found[name][:].to(dtype).float(), weight), name


def test_every_cut_of_every_layout_is_that_of_the_twin(pair):
    twin, found = expected(pair[0], torch.float32), HfTensors(pair[0])
    hf = read_hf_config(pair[0])
    for block in weight_blocks(hf):
        for size in (1, 2):
            for rank in range(size):
                ours, theirs = (
                    block.sharding.shard([source[name] for name in block.hf_names], rank, size, hf)
                    for source in (found, twin)
                )
                assert torch.equal(ours, theirs), (block.key, rank, size)


def check_loaded(folders, layout):
    parallel, loaded = initialise(layout), []
    for folder in folders:
        hf = read_hf_config(folder)
        chunks = build_model(hf, parallel, "bf16")
        load_shards(chunks, HfTensors(folder), hf, parallel)
        loaded.append([p for chunk in chunks for p in chunk.parameters()])
    for ours, theirs in zip(*loaded, strict=True):
        assert ours.dtype == BF16 and torch.equal(ours, theirs)
    shutdown()


@pytest.mark.parametrize("axes", [{"tp": 2, "ep": 2}, {"pp": 2}, {"etp": 2, "tp": 2}])
def test_a_layout_holds_the_twins_weights_on_every_rank(moe_folder, tmp_path, axes):
    write_scaled(moe_folder, tmp_path / "fp8", tmp_path / "twin", *KINDS["block"])
    run_world(2, check_loaded, [tmp_path / "fp8", tmp_path / "twin"], Layout(**axes))


def test_a_scaled_folder_converts_and_comes_back_plain(pair, tmp_path):
    folder, _ = pair
    config = json.loads((folder / "config.json").read_text()) | {"dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(config))
    hf_to_megatron(folder, tmp_path / "checkpoint")
    megatron_to_hf(tmp_path / "checkpoint", tmp_path / "out")
    twin = expected(folder, BF16)
    back = load_file(tmp_path / "out/model.safetensors")
    assert back.keys() == twin.keys()
    assert all(torch.equal(back[name].to(BF16).float(), twin[name]) for name in twin)
    exported = json.loads((tmp_path / "out/config.json").read_text())
    assert exported == {k: v for k, v in config.items() if k != "quantization_config"}
    hf_model(tmp_path / "out", torch.float32)  # transformers takes it for a plain model
    found = compare(read_side(folder), read_side(tmp_path / "out"))
    assert found.figures["different"] == 0


def test_a_run_of_a_scaled_student_writes_a_plain_folder(pair, tmp_path):
    tensors = HfTensors(pair[0])
    save_folder(tmp_path / "out", ((name, tensors[name][:]) for name in tensors), pair[0])
    assert "quantization_config" not in (tmp_path / "out/config.json").read_text()
    assert read_hf_config(tmp_path / "out").quantization is None
    hf_model(tmp_path / "out", torch.float32)


def spoiled(folder, change):
    """The sentence that a folder gets after `change(config, tensors)`."""
    config = json.loads((folder / "config.json").read_text())
    tensors = load_file(folder / "model.safetensors")
    change(config, tensors)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(RecipeError) as error:
        HfTensors(folder)
    return str(error.value)


RECIPE = Path("recipes/demo_tiny_moe.yaml")
Q = "model.layers.0.self_attn.q_proj."
NO_SCALE = f"{Q}weight is F8_E4M3 and its scales '{Q}weight_scale_inv' are missing"


def settings(**changed):
    return lambda config, tensors: config["quantization_config"].update(changed)


def recast(name, dtype):
    return lambda config, tensors: tensors.update({name: tensors[name].to(dtype)})


def compressed(**weights):
    form = weights.pop("format", "float-quantized")
    value = compressed_tensors_config(**{"strategy": "channel"} | weights) | {"format": form}
    return lambda config, tensors: config.update(quantization_config=value)


REFUSED = {
    "no scales": (lambda c, t: t.pop(Q + "weight_scale_inv"), NO_SCALE),
    "no quantization_config": (lambda c, t: c.pop("quantization_config"), "no quantization_config"),
    "gptq": (settings(quant_method="gptq"), "quant_method 'gptq' is not supported"),
    "static": (settings(activation_scheme="static"), "activation_scheme 'static' is not"),
    "other block": (settings(weight_block_size=[32, 32]), "not imply for a weight of (64, 64)"),
    "e5m2": (recast(Q + "weight", torch.float8_e5m2), "q_proj.weight is F8_E5M2; only"),
    "int8": (recast(Q + "weight", torch.int8), "q_proj.weight is I8; only"),
    "scales of bytes": (recast(Q + "weight_scale_inv", torch.uint8), "weight_scale_inv is U8"),
    "a plain weight's scales": (recast(Q + "weight", torch.float32), "weight_scale_inv', which"),
    "a stored input scale": (
        lambda c, t: t.update({Q + "input_scale": torch.ones(1)}),
        "q_proj.input_scale', which its config.json does not imply",
    ),
    "int4": (compressed(num_bits=4), "weights.num_bits 4 is not supported"),
    "groups that are none": (
        lambda c, t: c.update(
            quantization_config=compressed_tensors_config() | {"config_groups": {"g": "x"}}
        ),
        "config_groups.g='x' must be an object",
    ),
    "weights that are none": (
        lambda c, t: c.update(
            quantization_config=compressed_tensors_config()
            | {"config_groups": {"g": {"weights": [1], "format": "float-quantized"}}}
        ),
        "weights=[1] must be an object",
    ),
    "a list of strategies": (compressed(strategy=["channel"]), "weights.strategy ['channel']"),
    "packed": (compressed(format="pack-quantized"), "format 'pack-quantized' is not supported"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_other_scalings_are_refused_by_name(moe_folder, tmp_path, case):
    write_scaled(moe_folder, tmp_path / "fp8", tmp_path / "twin", *KINDS["block"])
    change, words = REFUSED[case]
    message = spoiled(tmp_path / "fp8", change)
    assert words in message and message.endswith(".") and "\n" not in message


def test_plain_weights_under_a_quantization_config_are_refused(moe_folder, tmp_path):
    write_scaled(moe_folder, tmp_path / "fp8", tmp_path / "twin", *KINDS["block"])
    plain = load_file(tmp_path / "twin/model.safetensors")
    message = spoiled(tmp_path / "fp8", lambda c, t: (t.clear(), t.update(plain)))
    assert "no weight is stored as F8_E4M3 with scales; remove it there" in message


def test_released_sizes_fit_their_blocks():
    """Scales of Qwen3-30B-A3B-FP8, 235B-A22B-FP8 and DeepSeek-V3: 128 x 128."""
    from iwopd_megatron.hf.quantization import read_quantization

    content = {"quantization_config": FP8_CONFIG | {"weight_block_size": [128, 128]}}
    quantization = read_quantization(content, "config.json")
    for shape in ((4096, 2048), (512, 2048), (2048, 768), (12288, 4096), (576, 7168)):
        grid = tuple(math.ceil(n / 128) for n in shape)
        assert quantization.block(shape, grid) == (128, 128)
        assert quantization.block(shape, (grid[0], grid[1] + 1)) is None


@pytest.mark.usefixtures("in_the_repository")
def test_servers_are_not_given_a_scaled_student(moe_folder, tmp_path):
    write_scaled(moe_folder, tmp_path / "fp8", tmp_path / "twin", *KINDS["block"])
    served = ["rollout.engine=vllm", "rollout.servers.start=1"]
    for name, is_refused in (("fp8", True), ("twin", False)):
        recipe = read_recipe(RECIPE, [*served, f"student.hf={tmp_path / name}"])
        with pytest.raises(RecipeError, match="iwopd export") if is_refused else nullcontext():
            check_rollout(recipe)


def test_the_planner_counts_the_plain_weights_that_are_held(moe_folder, tmp_path):
    write_scaled(moe_folder, tmp_path / "fp8", tmp_path / "twin", *KINDS["block"])
    scaled, plain = (ModelSize.of(planning_config(tmp_path / name)) for name in ("fp8", "twin"))
    assert scaled == plain
    published = [planning_config(Path("models") / f"Qwen3-235B-A22B{end}") for end in ("", "-FP8")]
    assert published[0] == published[1]
