"""Checkpoints written without a model are what Megatron loads, in every layout, bit for bit."""

import math
import pickle
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from with_versions.resave import resave, whole_tensors
from worlds import run_world

from iwopd_megatron.config.models import Layout
from iwopd_megatron.config.recipe import Train
from iwopd_megatron.hf.config import read_hf_config
from iwopd_megatron.hf.shapes import hf_shape
from iwopd_megatron.models.gpt import build_model, wrap_precision
from iwopd_megatron.models.optimizer import build_optimizer, build_scheduler, wrap_data_parallel
from iwopd_megatron.runtime.megatron import dist_checkpointing
from iwopd_megatron.runtime.parallel import initialise
from iwopd_megatron.train import checkpoint
from iwopd_megatron.train.saver import Saver
from iwopd_megatron.weights import pieces
from iwopd_megatron.weights.convert import hf_to_megatron, megatron_to_hf
from iwopd_megatron.weights.hf_reader import HfTensors, load_shards
from iwopd_megatron.weights.table import weight_blocks, weights_of
from iwopd_megatron.weights.torch_dist import writer as torch_dist
from iwopd_megatron.weights.torch_dist.blob import data_start, envelope, serialise

sys.path.append(str(Path(__file__).parents[1] / "bench"))
from checkpoint_contents import contents  # noqa: E402


@pytest.fixture(scope="module")
def folders(moe_folder, dense_folder, tied_folder, family_folders):
    families = [x for name, x in family_folders.items() if not name.startswith("qwen3")]
    return [moe_folder, dense_folder, tied_folder, *families]


def having_experts(folders):
    return [folder for folder in folders if read_hf_config(folder).num_experts]


@pytest.fixture(scope="module")
def converted(folders, tmp_path_factory):
    """Each folder's checkpoint, cut into many pieces by a small limit."""
    out = tmp_path_factory.mktemp("converted")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pieces, "PIECE_BYTES", 3000)
        patch.setattr(torch_dist, "FILE_BYTES", 200_000)
        for folder in folders:
            hf_to_megatron(folder, out / folder.name)
            assert len(list((out / folder.name).glob("*.distcp"))) > 4
    return out


def state_of(chunks, parallel):
    metadata = checkpoint.METADATA | {"dp_cp_group": parallel.dp_cp.group}
    return {f"model{i}": x.sharded_state_dict(metadata=metadata) for i, x in enumerate(chunks)}


def assert_loaded(folder, checkpoint_folder, parallel, dtype="fp32") -> None:
    """Every parameter of this rank is what its shard of the folder is."""
    hf = read_hf_config(folder)
    chunks, expected = build_model(hf, parallel, dtype), build_model(hf, parallel, dtype)
    wrap_precision(chunks), wrap_precision(expected)
    load_shards(expected, HfTensors(folder), hf, parallel)
    for chunk in chunks:
        for parameter in weights_of(chunk).values():
            parameter.data.fill_(math.nan)
    loaded = dist_checkpointing.load(state_of(chunks, parallel), str(checkpoint_folder))
    count = 0
    for i, (chunk, other) in enumerate(zip(chunks, expected, strict=True)):
        chunk.load_state_dict(loaded[f"model{i}"])
        for (name, got), want in zip(
            weights_of(chunk).items(), weights_of(other).values(), strict=True
        ):
            assert got.dtype == want.dtype and torch.equal(got, want), (folder.name, name)
            count += 1
    assert count > 6  # one layer and an embedding


def check_load(folders, converted, layout) -> None:
    parallel = initialise(layout)
    for folder in folders:
        assert_loaded(folder, converted / folder.name, parallel)


@pytest.mark.parametrize(
    ("layout", "dense"),
    [
        (Layout(), True),
        (Layout(tp=2), True),
        (Layout(pp=2), True),
        (Layout(pp=2, vpp=2), True),
        (Layout(pp=2, num_layers_in_first_pipeline_stage=3), True),
        (Layout(pp=2, vpp=2, pipeline_model_parallel_layout="E|t*3|t|L"), True),
        (Layout(ep=2), False),
        (Layout(etp=2), False),
        (Layout(tp=2, etp=2), False),
        (Layout(tp=2, ep=2), False),
    ],
    ids=str,
)
def test_megatron_loads_every_parameter(folders, converted, layout, dense):
    run_world(
        layout.unit, check_load, folders if dense else having_experts(folders), converted, layout
    )


def check_bf16(folder, checkpoint_folder) -> None:
    assert_loaded(folder, checkpoint_folder, initialise(Layout(ep=2)), "bf16")


@pytest.mark.parametrize("family", ["qwen3_moe", "glm4_moe"])
def test_megatron_loads_bf16(family, family_folders, tmp_path):
    """Biases that choose experts stay in fp32."""
    folder = family_folders[family]
    tensors = load_file(folder / "model.safetensors")
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").write_text((folder / "config.json").read_text())
    low = {name: x if "bias" in name else x.bfloat16() for name, x in tensors.items()}
    save_file(low, tmp_path / "hf" / "model.safetensors")
    hf_to_megatron(tmp_path / "hf", tmp_path / "ckpt")
    run_world(2, check_bf16, tmp_path / "hf", tmp_path / "ckpt")


def save_with_optimizer(folders, out, layout) -> None:
    """Megatron's own checkpoints, with optimiser states and generators."""
    parallel = initialise(layout)
    train = Train(lr=1e-3, rounds=10)
    for folder in folders:
        hf = read_hf_config(folder)
        chunks = build_model(hf, parallel)
        load_shards(chunks, HfTensors(folder), hf, parallel)
        wrapped = wrap_data_parallel(chunks, train)
        optimizer = build_optimizer(wrapped, train)
        extra = {"round": 1, "world": parallel.world}
        scheduler = build_scheduler(optimizer, train)
        saver = Saver(out / folder.name, 1, False, parallel)
        checkpoint.save(saver, wrapped, optimizer, scheduler, extra, parallel)


@pytest.mark.parametrize(
    ("layout", "dense"),
    [(Layout(tp=2), True), (Layout(pp=2, vpp=2), True), (Layout(ep=2), False),
     (Layout(etp=2), False),
     (Layout(pp=2, vpp=2, pipeline_model_parallel_layout="E|t*3|t|L"), True)],
    ids=str,
)  # fmt: skip
def test_export_of_megatrons_own_checkpoint(folders, tmp_path, layout, dense):
    folders = folders if dense else having_experts(folders)
    run_world(layout.unit, save_with_optimizer, folders, tmp_path, layout)
    for folder in folders:
        source = tmp_path / folder.name / "checkpoints/round_000001"
        megatron_to_hf(source, tmp_path / f"{folder.name}_hf", folder)
        got = load_file(tmp_path / f"{folder.name}_hf" / "model.safetensors")
        want = load_file(folder / "model.safetensors")
        assert got.keys() == want.keys()
        for name, tensor in want.items():
            assert got[name].dtype == tensor.dtype and torch.equal(got[name], tensor), name


EVEN, UNEVEN = {"pp": 2}, {"pp": 2, "num_layers_in_first_pipeline_stage": 1}
EMPTY_ENDS = {"pp": 2, "vpp": 2, "pipeline_model_parallel_layout": "E|t*3|t|L"}
RESTAGED = [
    ("moe", UNEVEN, {"ep": 2}), ("moe", {"ep": 2}, EMPTY_ENDS), ("moe", EMPTY_ENDS, UNEVEN),
    ("tied", UNEVEN, EVEN), ("tied", EVEN, EMPTY_ENDS), ("dense_first", UNEVEN, {"ep": 2}),
    ("dense_first", {"tp": 2}, EMPTY_ENDS),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "first", "second"), RESTAGED, ids=str)
def test_weights_and_optimiser_move_between_stages(
    kind, first, second, moe_folder, tied_folder, family_folders, tmp_path
):
    folders = {"moe": moe_folder, "tied": tied_folder, "dense_first": family_folders["glm4_moe"]}
    model, place = folders[kind], "checkpoints/round_000001"
    for source, out, axes in ((None, "one", first), (tmp_path / "one" / place, "other", second)):
        layout = Layout(**axes)
        run_world(layout.unit, resave, model, source, tmp_path / out, layout)
    before, after = (whole_tensors(tmp_path / out / place) for out in ("one", "other"))
    moments = [key for key in before if "exp_avg" in key]
    assert len(moments) > 8 and all(before[key].any() for key in moments)
    assert before.keys() == after.keys()
    for key, tensor in before.items():
        assert torch.equal(tensor, after[key]), key


def save_plain(folders, out) -> None:
    parallel = initialise(Layout())
    for folder in folders:
        (out / folder.name).mkdir()
        chunks = build_model(read_hf_config(folder), parallel)
        dist_checkpointing.save(state_of(chunks, parallel), str(out / folder.name))


def test_the_same_names_shapes_and_objects_as_megatron_writes(folders, converted, tmp_path):
    run_world(1, save_plain, folders, tmp_path)
    for folder in folders:
        assert contents(converted / folder.name) == contents(tmp_path / folder.name)
        for index, place in _tensor_blobs(tmp_path / folder.name):  # read without torch.load
            blob = (tmp_path / folder.name / place.relative_path).read_bytes()
            blob = memoryview(blob)[place.offset : place.offset + place.length]
            assert data_start(blob, index, torch.float32) is not None


def _tensor_blobs(folder):
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    for key, item in metadata.state_dict_metadata.items():
        for chunk in getattr(item, "chunks", []):
            place = next(
                p
                for i, p in metadata.storage_data.items()
                if i.fqn == key and i.offset == chunk.offsets
            )
            yield tuple(chunk.sizes), place


def test_stacks_are_what_the_table_says(moe_folder, dense_folder):
    """A stack block is its sources' rows: moving rows alone is the table's own cut."""
    for folder in (moe_folder, dense_folder):
        hf, tensors = read_hf_config(folder), load_file(folder / "model.safetensors")
        seen = set()
        for names in ("native", "te"):
            all_blocks = list(weight_blocks(hf, names))
            assert sorted(x for b in all_blocks for x in b.hf_names) == sorted(tensors)
            for block in all_blocks:
                sources = [tensors[name] for name in block.hf_names]
                assert [tuple(x.shape) for x in sources] == [
                    hf_shape(name, hf) for name in block.hf_names
                ]
                whole = block.sharding.shard(sources, 0, 1, hf)
                assert tuple(whole.shape) == torch_dist.block_shape(block, hf)
                assert torch.equal(whole, torch.cat(sources)) == block.sharding.is_stack
                seen.add(block.sharding.is_stack)
        assert seen == {True, False}


def test_te_names(moe_folder, dense_folder):
    """What TransformerEngine renames: norms inside the linear that follows."""
    moe, dense = (
        {block.key for block in weight_blocks(read_hf_config(folder), "te")}
        - {block.key for block in weight_blocks(read_hf_config(folder), "native")}
        for folder in (moe_folder, dense_folder)
    )
    prefix = "decoder.layers."
    assert moe == {prefix + "self_attention.linear_qkv.layer_norm_weight"}
    assert dense == moe | {prefix + "mlp.linear_fc1.layer_norm_weight"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_envelope_is_what_torch_saves(tmp_path, dtype):
    tensor = torch.randn(3, 7, 5).to(dtype)
    edge = envelope((3, 7, 5), dtype)
    data = bytes(tensor.view(torch.uint8).numpy())
    (tmp_path / "blob").write_bytes(edge.before + data + edge.after)
    assert torch.equal(torch.load(tmp_path / "blob", weights_only=True), tensor)
    blob = memoryview(serialise(tensor, checksums=True))
    start = data_start(blob, (3, 7, 5), dtype)
    assert blob[start : start + len(data)] == data
    assert data_start(blob, (7, 3, 5), dtype) is None
    blob = memoryview(serialise(tensor.transpose(0, 1)))
    assert data_start(blob, (7, 3, 5), dtype) is None  # left to torch.load


def test_an_envelope_takes_no_memory():
    """Of a tensor as large as a layer's experts in a checkpoint of one process, 9.7 GB."""

    def anonymous() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(x for x in lines if x.startswith("VmHWM")).split()[1])

    before = anonymous()
    edge = envelope((1, 128, 4096, 1536 * 6), torch.bfloat16)
    assert b"data.pkl" in edge.before and len(edge.before + edge.after) < 4000
    assert anonymous() - before < 100_000
