"""The weight table in both directions: shards, streams over worlds, and written folders."""

import json
import re
import shutil
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import load_file, save_file
from worlds import run_world

from iwopd_megatron.config.models import Layout
from iwopd_megatron.hf.config import read_hf_config
from iwopd_megatron.hf.headers import stored_tensors
from iwopd_megatron.models.gpt import build_model
from iwopd_megatron.runtime.parallel import initialise
from iwopd_megatron.weights import shards, sync
from iwopd_megatron.weights.hf_reader import HfTensors, load_shards
from iwopd_megatron.weights.hf_writer import save_folder
from iwopd_megatron.weights.sharding import GATED, QKV
from iwopd_megatron.weights.sync import WeightStream
from iwopd_megatron.weights.table import mapped_parameters
from iwopd_megatron.weights.transformers_views import named_views, random_weights


@pytest.fixture(scope="session")
def folders(moe_folder, moe_no_norm_folder, dense_folder, tied_folder, family_folders):
    families = [x for name, x in family_folders.items() if not name.startswith("qwen3")]
    return [moe_folder, moe_no_norm_folder, dense_folder, tied_folder, *families]


def having_experts(folders):
    return [folder for folder in folders if read_hf_config(folder).num_experts]


def on_disk(folder):
    return load_file(folder / "model.safetensors")


def assert_same(got: dict, expected: dict) -> None:
    """The same names, shapes, dtypes and bits."""
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        assert got[name].dtype == tensor.dtype and torch.equal(got[name], tensor), name


def check_round_trip(folders) -> None:
    parallel = initialise(Layout())
    for folder in folders:
        hf, whole, lazy = read_hf_config(folder), on_disk(folder), HfTensors(folder)
        assert set(lazy) == set(whole) and len(lazy) == len(whole)
        covered = []
        for mapped in mapped_parameters(*build_model(hf, parallel), hf):
            covered += mapped.hf_names if not mapped.is_copy else []
            for sources in (whole, lazy):  # whole tensors, and slices of a file
                tensors = [sources[name] for name in mapped.hf_names]
                assert mapped.sharding.shard(tensors, 0, 1, hf).shape == mapped.parameter.shape
                for size in (1, 2):
                    parts = [mapped.sharding.shard(tensors, rank, size, hf) for rank in range(size)]
                    back = mapped.sharding.unshard(parts, hf)
                    expected = {name: whole[name] for name in mapped.hf_names}
                    assert_same(dict(zip(mapped.hf_names, back, strict=True)), expected)
        assert sorted(covered) == sorted(whole)  # every tensor of the folder, once


def test_round_trip_of_every_entry(folders):
    run_world(1, check_round_trip, folders)


def test_qkv_by_hand():
    """2 groups of 2 queries, head size 1: [q0 q1 k0 v0 q2 q3 k1 v1]."""
    hf = SimpleNamespace(num_key_value_heads=2, head_dim=1)
    q, k, v = (
        torch.arange(4.0)[:, None],
        torch.tensor([[10.0], [11.0]]),
        torch.tensor([[20.0], [21.0]]),
    )
    assert QKV.shard([q, k, v], 0, 1, hf)[:, 0].tolist() == [0, 1, 10, 20, 2, 3, 11, 21]
    assert QKV.shard([q, k, v], 1, 2, hf)[:, 0].tolist() == [2, 3, 11, 21]


def test_gated_by_hand():
    """A rank holds its rows of the gate, then its rows of up."""
    gate, up = torch.arange(4.0)[:, None], 10 + torch.arange(4.0)[:, None]
    assert GATED.shard([gate, up], 1, 2, {})[:, 0].tolist() == [2, 3, 12, 13]


def check_stream(folders, layout: Layout, expected_buckets: int) -> None:
    parallel = initialise(layout)
    for folder in folders:
        hf = read_hf_config(folder)
        chunks = build_model(hf, parallel)
        load_shards(chunks, HfTensors(folder), hf, parallel)
        buckets = 0
        for limit in (2**28, 50_000):
            sync.BUCKET_BYTES = limit  # in this process only
            stream = WeightStream(chunks, hf, parallel)
            assert sum(stream.counts) > buckets  # of all stages: one may have a single tensor
            buckets = sum(stream.counts)
            for _ in range(2):  # it can be read again
                pairs = list(stream)
                got = dict(pairs)
                assert len(got) == len(pairs)
                assert_same(got, on_disk(folder))
            check_fused_together(pairs)
        assert buckets >= expected_buckets


def check_fused_together(pairs) -> None:
    """However small its buckets are, what a server makes one tensor of comes in one."""
    sync.BUCKET_BYTES = 1
    runs = [[name for name, _ in run] for run in sync.named_buckets(pairs)]
    for names in (run for run in runs if run[0].endswith("q_a_proj.weight")):
        assert names == [names[0], names[0].replace("q_a_proj", "kv_a_proj_with_mqa")]


@pytest.mark.parametrize(
    ("layout", "dense"),
    [
        (Layout(), True),
        (Layout(tp=2), True),
        (Layout(tp=2, etp=2), False),
        (Layout(etp=2), False),
        (Layout(ep=2), False),
        (Layout(pp=2), True),
        (Layout(pp=2, vpp=2), True),
        (Layout(pp=2, num_layers_in_first_pipeline_stage=1), True),
        (Layout(pp=2, pipeline_model_parallel_layout="E|t*4L"), True),
        (Layout(pp=2, vpp=2, pipeline_model_parallel_layout="Et|t*2|t|L"), True),
        (Layout(pp=2, ep=2, num_layers_in_last_pipeline_stage=1), False),
        (Layout(tp=2, ep=2), False),
        (Layout(tp=2, pp=2, ep=2), False),
        (Layout(etp=2, ep=2), False),
        (Layout(tp=2, etp=2, ep=2), False),
    ],
    ids=str,
)
def test_stream_equals_the_folder_on_every_rank(folders, layout, dense):
    run_world(layout.unit, check_stream, folders if dense else having_experts(folders), layout, 3)


def check_two_replicas(folder) -> None:
    """tp = 2 on four ranks: both data-parallel replicas stream the same weights."""
    check_stream([folder], Layout(tp=2), 3)


def test_stream_of_data_parallel_replicas(dense_folder):
    run_world(4, check_two_replicas, dense_folder)


def check_refusals(folder, incomplete) -> None:
    parallel = initialise(Layout())
    hf = read_hf_config(folder)
    chunks = build_model(hf, parallel)
    name = "model.layers.2.self_attn.q_norm.weight"
    with pytest.raises(
        ValueError, match=f"{incomplete} has no tensor '{name}' although its config"
    ):
        load_shards(chunks, HfTensors(incomplete), hf, parallel)
    tensors = on_disk(folder)
    tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"][:-1]
    with pytest.raises(ValueError) as error:
        load_shards(chunks, tensors, hf, parallel)
    assert str(error.value) == (
        "model.embed_tokens.weight has the wrong shape: its shard for "
        "embedding.word_embeddings.weight is (511, 64), config.json implies (512, 64)."
    )


def test_load_shards_refusals(dense_folder, tmp_path):
    tensors = on_disk(dense_folder)
    del tensors["model.layers.2.self_attn.q_norm.weight"]
    shutil.copy(dense_folder / "config.json", tmp_path)
    save_file(tensors, tmp_path / "model.safetensors")
    run_world(1, check_refusals, dense_folder, tmp_path)


def test_a_parameter_without_a_row_is_named(tmp_path):
    chunk = torch.nn.Module()
    chunk.strange = torch.nn.Parameter(torch.zeros(1))
    with pytest.raises(KeyError, match="no row for Megatron parameter strange"):
        list(
            mapped_parameters(chunk, SimpleNamespace(model_type="qwen3", tie_word_embeddings=False))
        )


def test_unreadable_folders(tmp_path):
    with pytest.raises(ValueError, match="neither model.safetensors nor"):
        stored_tensors(tmp_path)
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="model-00001-of-00002.safetensors cannot be read"):
        stored_tensors(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"torn")
    with pytest.raises(ValueError, match="model.safetensors cannot be read as safetensors"):
        stored_tensors(tmp_path)


def reloaded(folder) -> dict:
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    return {name: tensor.clone() for name, tensor in named_views(model).items()}


def test_views_have_the_names_and_bits_on_disk(folders):
    for folder in folders:
        assert_same(reloaded(folder), on_disk(folder))


def greedy_shards(tensors: dict, limit: int) -> int:
    """How many files of at most `limit` bytes the tensors fill in their order."""
    count, size = 0, limit
    for tensor in tensors.values():
        if size + tensor.nbytes > limit:
            count, size = count + 1, 0
        size += tensor.nbytes
    return count


@pytest.mark.parametrize("shard_bytes", [None, 100_000])
def test_written_folder_loads_in_transformers(folders, tmp_path, monkeypatch, shard_bytes):
    if shard_bytes:
        monkeypatch.setattr(shards, "SHARD_BYTES", shard_bytes)
    for source in folders:
        out, tensors = tmp_path / source.name, on_disk(source)
        out.mkdir()
        (out / "left-over.txt").write_text("of an earlier export")
        save_folder(out, tensors.items(), source)
        assert not (out / "left-over.txt").exists()
        assert [f.name for f in tmp_path.iterdir() if "partial" in f.name] == []
        assert (out / "config.json").read_bytes() == (source / "config.json").read_bytes()
        files = sorted(f.name for f in out.glob("*.safetensors"))
        if shard_bytes:
            count = greedy_shards(tensors, shard_bytes)
            assert count > 3
            assert files == [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
            index = json.loads((out / "model.safetensors.index.json").read_text())
            total = sum(t.nbytes for t in tensors.values())
            assert index["metadata"]["total_size"] == total
            for file in files:  # a shard is within the limit unless one tensor alone is not
                shard = load_file(out / file)
                assert len(shard) == 1 or sum(t.nbytes for t in shard.values()) <= shard_bytes
        else:
            assert files == ["model.safetensors"]
        assert_same({name: x[:] for name, x in HfTensors(out).items()}, tensors)
        assert_same(reloaded(out), tensors)


CUTS = [[10], [10, 10, 10], [3, 25, 4, 9, 2], [30, 1], [1, 30], [30, 40, 2, 2], [5, 50, 16, 20]]


@pytest.mark.parametrize("sizes", CUTS, ids=str)
def test_a_stream_is_cut_as_transformers_cuts_all_tensors(sizes, moe_folder, tmp_path, monkeypatch):
    """A tensor above the limit has a file of its own; the one begun before it goes on."""
    monkeypatch.setattr(shards, "SHARD_BYTES", 20)
    tensors = {f"x{i}": torch.full((n,), i, dtype=torch.uint8) for i, n in enumerate(sizes)}
    save_folder(tmp_path / "out", iter(tensors.items()), moe_folder)
    expected = split_torch_state_dict_into_shards(tensors, max_shard_size=20)
    shards_on_disk = {f.name: load_file(f) for f in (tmp_path / "out").glob("*.safetensors")}
    assert {file: set(shard) for file, shard in shards_on_disk.items()} == {
        file: set(names) for file, names in expected.filename_to_tensors.items()
    }
    assert_same({k: x for shard in shards_on_disk.values() for k, x in shard.items()}, tensors)
    index = tmp_path / "out" / "model.safetensors.index.json"
    assert index.exists() == expected.is_sharded
    if expected.is_sharded:
        written = json.loads(index.read_text())
        assert written["weight_map"] == expected.tensor_to_filename
        assert written["metadata"] == expected.metadata == {"total_size": sum(sizes)}


def test_random_weights(moe_folder, tied_folder):
    for folder in (moe_folder, tied_folder):
        state = torch.get_rng_state()
        first, again, other = (random_weights(folder, seed) for seed in (1, 1, 2))
        assert torch.equal(torch.get_rng_state(), state)  # nobody else's randomness moves
        assert_same(first, again)
        disk = on_disk(folder)
        assert {k: v.shape for k, v in first.items()} == {k: v.shape for k, v in disk.items()}
        matrices = [k for k in first if not re.search("norm", k)]
        assert not any(torch.equal(first[k], other[k]) for k in matrices)
