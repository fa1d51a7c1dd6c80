"""Conversion there and back is the identity on bytes, and refuses what it cannot vouch for."""

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from damage import (
    exchanged_experts,
    lost_norm,
    on_disk,
    one_bit,
    other_epsilon,
    padded_vocabulary,
    random_bits,
    swapped_gate,
    unpermuted,
    write_folder,
)
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from iwopd_megatron.cli import main as cli
from iwopd_megatron.errors import RecipeError
from iwopd_megatron.files import rawfile
from iwopd_megatron.parity.check import compare, read_side
from iwopd_megatron.weights import pieces, shards
from iwopd_megatron.weights.convert import hf_to_megatron, megatron_to_hf
from iwopd_megatron.weights.hf_reader import check_finite
from iwopd_megatron.weights.torch_dist.reader import CheckpointReader


def assert_same_bytes(got: dict, want: dict) -> None:
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        assert got[name].dtype == tensor.dtype and got[name].shape == tensor.shape, name
        assert rawfile.raw(got[name]) == rawfile.raw(tensor), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("names", ["native", "te"])
@pytest.mark.parametrize(("files", "workers", "limit"), [(1, 1, 2**25), (5, 3, 3000)])
def test_there_and_back(
    moe_folder,
    dense_folder,
    tied_folder,
    family_folders,
    tmp_path,
    monkeypatch,
    dtype,
    names,
    files,
    workers,
    limit,
):
    monkeypatch.setattr(pieces, "PIECE_BYTES", limit)
    monkeypatch.setattr(shards, "SHARD_BYTES", 10 * limit)
    for template in (moe_folder, dense_folder, tied_folder, *family_folders.values()):
        tensors = random_bits(on_disk(template), dtype)
        source = write_folder(tmp_path / template.name, template, tensors, files)
        checkpoint, back = tmp_path / f"{template.name}_m", tmp_path / f"{template.name}_b"
        hf_to_megatron(source, checkpoint, names, workers)
        megatron_to_hf(checkpoint, back, source, workers)
        assert_same_bytes(on_disk(back), tensors)
        assert (len(list(back.glob("*.safetensors"))) > 3) == (limit == 3000)
        ours, theirs = (json.loads((x / "manifest.json").read_text()) for x in (checkpoint, back))
        assert ours == theirs and ours["tensors"].keys() == tensors.keys()
        hf_to_megatron(back, tmp_path / "again", names, force=True)  # from our own shards
        assert not list(tmp_path.glob("*.partial")) + list(tmp_path.glob("*.replaced"))


def test_mixed_dtypes_are_kept(dense_folder, tmp_path):
    """Odd bytes before wide ones: fp32 norms beside bf16 matrices."""
    tensors = {
        name: x if "norm" in name else x.bfloat16() for name, x in on_disk(dense_folder).items()
    }
    source = write_folder(tmp_path / "hf", dense_folder, tensors)
    hf_to_megatron(source, tmp_path / "m")
    megatron_to_hf(tmp_path / "m", tmp_path / "b", source)
    assert_same_bytes(on_disk(tmp_path / "b"), tensors)
    with safe_open(tmp_path / "b" / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
    tensors["model.layers.1.input_layernorm.weight"] = torch.ones(64, dtype=torch.float16)
    source = write_folder(tmp_path / "torn", dense_folder, tensors)
    with pytest.raises(RecipeError, match="layernorm.weight is F16, the same weight of another"):
        hf_to_megatron(source, tmp_path / "m2")


def test_transformers_loads_what_is_exported(tmp_path, monkeypatch):
    """Its tokenizer too; several shards, and the very same logits."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    monkeypatch.setattr(shards, "SHARD_BYTES", 200_000)
    source, back = Path(__file__).parents[1] / "recipes/demo/student", tmp_path / "b"
    hf_to_megatron(source, tmp_path / "m")
    megatron_to_hf(tmp_path / "m", back, source)
    assert (back / "model.safetensors.index.json").is_file()
    ids, logits = torch.arange(16)[None], []
    for folder in (source, back):
        model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
        assert not any(report.values()), report
        logits.append(model(ids).logits)
    assert torch.equal(*logits)
    text = "sort hgfedcba"
    ours, theirs = (AutoTokenizer.from_pretrained(x).encode(text) for x in (back, source))
    assert ours == theirs


def test_companion_files_are_carried(moe_folder, tmp_path):
    source = write_folder(tmp_path / "hf", moe_folder, on_disk(moe_folder), files=2)
    extra = {
        "tokenizer.json": "{}",
        "tokenizer_config.json": "{}",
        "chat_template.jinja": "{{ x }}",
        "merges.txt": "a b",
        "additional_chat_templates/tool.jinja": "t",
        "LICENSE": "free",
    }
    for name, text in extra.items():
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_text(text)
    hf_to_megatron(source, tmp_path / "m")
    megatron_to_hf(tmp_path / "m", tmp_path / "b", source)
    back = tmp_path / "b"
    for name in (*extra, "config.json", "generation_config.json"):
        assert (back / name).read_bytes() == (source / name).read_bytes()
    kept = {str(x.relative_to(back)) for x in back.rglob("*") if x.is_file()}
    own = {"config.json", "generation_config.json", "model.safetensors", "manifest.json"}
    assert kept == set(extra) | own


def test_a_tied_head_on_disk(tied_folder, tmp_path):
    """Some tied models store their head as well; it comes back, and must be the embedding."""
    tensors = on_disk(tied_folder)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    source = write_folder(tmp_path / "hf", tied_folder, tensors)
    hf_to_megatron(source, tmp_path / "m")
    megatron_to_hf(tmp_path / "m", tmp_path / "b", source)
    assert_same_bytes(on_disk(tmp_path / "b"), tensors)
    tensors["lm_head.weight"][3, 3] += 1
    source = write_folder(tmp_path / "other", tied_folder, tensors)
    with pytest.raises(RecipeError, match="lm_head.weight differs from model.embed_tokens.weight"):
        hf_to_megatron(source, tmp_path / "m2")


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (unpermuted, "layers.1.self_attn.k_proj.weight differs by"),
        (swapped_gate, "as model.layers.2.mlp.experts.3.up_proj.weight"),
        (exchanged_experts, "as model.layers.0.mlp.experts.6.gate_proj.weight"),
        (padded_vocabulary, "model.embed_tokens.weight: shape is [512, 64] and [528, 64]"),
        (other_epsilon, "config: rms_norm_eps is 1e-06 and 1e-05"),
        (one_bit, "model.norm.weight differs by"),
        (lost_norm, "k_norm.weight is in"),
    ],
)
def test_check_catches(moe_folder, tmp_path, damage, said):
    tensors = on_disk(moe_folder)
    config = json.loads((moe_folder / "config.json").read_text())
    damage(tensors, config)
    other = write_folder(tmp_path / "other", moe_folder, tensors)
    (other / "config.json").write_text(json.dumps(config))
    result = compare(read_side(moe_folder), read_side(other))
    assert any(said in problem for problem in result.problems), result.problems
    if damage not in (padded_vocabulary, lost_norm):  # the others run, and compute something else
        assert (result.figures["logits"] > 1e-9) == any("logits" in x for x in result.problems)
        assert result.figures["logits"] > (0 if damage is one_bit else 1e-5)
        assert damage is one_bit or result.figures["kl"] > 1e-12


def test_check_of_equal_models(moe_folder, tmp_path):
    hf_to_megatron(moe_folder, tmp_path / "m")
    source = write_folder(tmp_path / "hf", moe_folder, on_disk(moe_folder), files=3)
    result = compare(read_side(moe_folder), read_side(source, workers=2))
    assert result.problems == []
    assert result.figures == {
        "tensors": 135,
        "different": 0,
        "max_weight_error": 0.0,
        "logits": 0.0,
        "kl": 0.0,
    }
    for manifest in (tmp_path / "m", tmp_path / "m" / "manifest.json"):
        assert compare(read_side(manifest), read_side(source)).problems == []


def test_check_within_a_tolerance(dense_folder, tmp_path):
    tensors = on_disk(dense_folder)
    tensors["model.norm.weight"] += 1e-6
    other = write_folder(tmp_path / "other", dense_folder, tensors)
    sides = read_side(dense_folder), read_side(other)
    assert compare(*sides, tolerance=1e-4).problems == []
    assert len(compare(*sides, tolerance=1e-9).problems) >= 2


def test_commands(moe_folder, tmp_path):
    def run(*words: str | Path) -> tuple[int, str]:
        result = CliRunner().invoke(cli.app, [str(word) for word in words])
        return result.exit_code, result.output

    code, text = run("convert", moe_folder, tmp_path / "m", "--names", "te", "--workers", "2")
    assert code == 0 and text.startswith(f"wrote {tmp_path / 'm'}: 135 tensors")
    assert run("export", tmp_path / "m", tmp_path / "b", "--hf", moe_folder)[0] == 0
    assert run("check", tmp_path / "b", moe_folder)[0] == 0
    tensors = on_disk(moe_folder)
    swapped_gate(tensors, {})
    write_folder(tmp_path / "other", moe_folder, tensors)
    command = [sys.executable, "conversion/check.py", str(moe_folder), str(tmp_path / "other")]
    done = subprocess.run(
        command,
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        env=os.environ
        | {
            "PYTHONPATH": str(Path(__file__).parents[1])
            + os.pathsep
            + os.environ.get("PYTHONPATH", "")
        },
    )
    assert done.returncode == 1 and "error: model.layers.2.mlp.experts.3.gate_proj" in done.stderr
    assert json.loads(done.stdout)["different"] == 2


# Refusals: one sentence each, and nothing is left behind.


def refuse(match: str, function, *args, **kwargs) -> None:
    with pytest.raises(RecipeError, match=match) as error:
        function(*args, **kwargs)
    text = str(error.value)
    assert "\n" not in text and text.endswith(".")


def truncated(folder: Path) -> str:
    file = folder / "model-00002-of-00003.safetensors"
    os.truncate(file, file.stat().st_size - 7)
    return "model-00002-of-00003.safetensors cannot be read as safetensors"


def missing_shard(folder: Path) -> str:
    (folder / "model-00003-of-00003.safetensors").unlink()
    return "model-00003-of-00003.safetensors cannot be read as safetensors"


def torn_index(folder: Path) -> str:
    file = folder / "model.safetensors.index.json"
    file.write_text(file.read_text()[:-9])
    return "index.json is not a safetensors index"


def lying_index(folder: Path) -> str:
    file = folder / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    index["weight_map"]["model.norm.weight"] = index["weight_map"]["lm_head.weight"]
    names = sorted(index["weight_map"].items(), key=lambda item: item[1])
    index["weight_map"]["model.norm.weight"] = next(f for _, f in names if not has_norm(folder, f))
    file.write_text(json.dumps(index))
    return "lacks the tensor 'model.norm.weight' of the index"


def has_norm(folder: Path, file: str) -> bool:
    return "model.norm.weight" in load_file(folder / file)


def missing_tensor(folder: Path) -> str:
    name = "model.layers.0.mlp.gate.weight"
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    file = folder / content["weight_map"].pop(name)
    index.write_text(json.dumps(content))
    save_file({k: x for k, x in load_file(file).items() if k != name}, file)
    return "has no tensor 'model.layers.0.mlp.gate.weight' although its config.json implies it"


def extra_tensor(folder: Path) -> str:
    edit_config(folder, num_hidden_layers=3)
    return "has the tensor 'model.layers.3.input_layernorm.weight', which its config.json does not"


def wrong_shape(folder: Path) -> str:
    edit_config(folder, vocab_size=500)
    return r"embed_tokens.weight is \(512, 64\), config.json implies \(500, 64\)"


def other_heads(folder: Path) -> str:
    edit_config(folder, num_key_value_heads=4)
    return r"k_proj.weight is \(32, 64\), config.json implies \(64, 64\)"


def unknown_architecture(folder: Path) -> str:
    edit_config(folder, model_type="gptj")
    return "model_type 'gptj' is not supported"


def edit_config(folder: Path, **changes) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


@pytest.mark.parametrize(
    "damage",
    [
        truncated,
        missing_shard,
        torn_index,
        lying_index,
        missing_tensor,
        extra_tensor,
        wrong_shape,
        other_heads,
        unknown_architecture,
    ],
)
def test_unfit_folders(moe_folder, tmp_path, damage):
    source = write_folder(tmp_path / "hf", moe_folder, on_disk(moe_folder), files=3)
    refuse(damage(source), hf_to_megatron, source, tmp_path / "out")
    assert sorted(x.name for x in tmp_path.iterdir()) == ["hf"]


@pytest.fixture
def checkpoint(moe_folder, tmp_path):
    hf_to_megatron(moe_folder, tmp_path / "m")
    return tmp_path / "m"


def export_refused(match: str, checkpoint: Path, template: Path) -> None:
    refuse(match, megatron_to_hf, checkpoint, checkpoint.with_name("out"), template)
    assert not checkpoint.with_name("out").exists()


def test_unfit_checkpoints(checkpoint, moe_folder, dense_folder, tmp_path):
    file = checkpoint / "__0_0.distcp"
    whole = file.read_bytes()
    place = CheckpointReader(checkpoint).places
    at = max(x.offset for x in place.values() if x.relative_path == file.name) - 2000
    file.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
    export_refused("the files are damaged", checkpoint, moe_folder)
    file.write_bytes(whole[:-5000])
    export_refused("is truncated: it has", checkpoint, moe_folder)
    file.unlink()
    export_refused("distcp is missing although .metadata names it", checkpoint, moe_folder)
    file.write_bytes(whole)
    other = tmp_path / "eps"
    shutil.copytree(moe_folder, other)
    edit_config(other, rms_norm_eps=1e-5)
    export_refused("rms_norm_eps is 1e-05, but 1e-06 in the input's manifest", checkpoint, other)
    (checkpoint / "manifest.json").unlink()
    edit_config(other, vocab_size=500)
    export_refused("word_embeddings.weight is .512, 64., config.json implies", checkpoint, other)
    export_refused("which config.json does not imply|has no 'decoder", checkpoint, dense_folder)
    edit_config(other, vocab_size=512, tie_word_embeddings=True)
    export_refused("has 'output_layer.weight', which config.json does not imply", checkpoint, other)
    (checkpoint / ".metadata").write_bytes(b"torn")
    export_refused(".metadata cannot be read", checkpoint, moe_folder)
    (checkpoint / "metadata.json").write_text('{"sharded_backend": "zarr"}')
    export_refused("sharded_backend 'zarr' is not supported", checkpoint, moe_folder)
    (checkpoint / "metadata.json").unlink()
    export_refused("is not a torch_dist checkpoint", checkpoint, moe_folder)


def test_a_changed_folder_with_an_old_manifest(checkpoint, moe_folder, tmp_path):
    megatron_to_hf(checkpoint, tmp_path / "b", moe_folder)
    tensors = on_disk(tmp_path / "b")
    tensors["model.norm.weight"] += 1
    save_file(tensors, tmp_path / "b" / "model.safetensors")
    refuse(
        "or were changed and manifest.json has to go",
        hf_to_megatron,
        tmp_path / "b",
        tmp_path / "m2",
    )
    assert not (tmp_path / "m2").exists()


def contents(folder: Path) -> dict[str, bytes]:
    return {str(x.relative_to(folder)): x.read_bytes() for x in folder.rglob("*") if x.is_file()}


def test_nothing_is_overwritten_without_force(checkpoint, moe_folder, tmp_path):
    before = contents(checkpoint)
    refuse(
        "already exists; choose another folder, or add --force",
        hf_to_megatron,
        moe_folder,
        checkpoint,
    )
    assert contents(checkpoint) == before
    (checkpoint / "left-over").write_text("of an earlier run")
    hf_to_megatron(moe_folder, checkpoint, force=True)
    assert contents(checkpoint).keys() == before.keys()
    other = tmp_path / "thesis"
    other.mkdir()
    (other / "chapter1.tex").write_text("It was a dark night.")
    refuse("is no model folder or checkpoint", hf_to_megatron, moe_folder, other, force=True)
    source = write_folder(tmp_path / "hf", moe_folder, on_disk(moe_folder))
    refuse("holds the input", hf_to_megatron, source, source, force=True)
    refuse("holds the input", megatron_to_hf, checkpoint, source, source, force=True)
    assert (source / "model.safetensors").exists() and (other / "chapter1.tex").exists()


def test_a_small_disk_is_refused_first(moe_folder, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=1_000_000)
    monkeypatch.setattr(rawfile.shutil, "disk_usage", lambda path: usage)
    refuse("its disk has 1.00 MB free", hf_to_megatron, moe_folder, tmp_path / "m")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("call", ["ftruncate", "pwrite", "fsync"])
def test_a_disk_that_becomes_full(moe_folder, tmp_path, monkeypatch, call):
    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(rawfile.os, call, full)
    refuse("became full; free", hf_to_megatron, moe_folder, tmp_path / "m")
    assert list(tmp_path.iterdir()) == []


def test_a_forked_process_writes_through_a_buffer_of_its_own():
    """Checkpoints are written by forks, each while others and this process write theirs."""
    stage = rawfile._stage()
    stage[:4] = b"here"
    child = os.fork()
    if child == 0:
        rawfile._stage()[:4] = b"fork"
        os._exit(0)
    os.waitpid(child, 0)
    assert stage[:4] == b"here"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_refused(wrong, dtype):
    weight = torch.arange(12, dtype=dtype).view(3, 4)
    check_finite(weight, "w")
    weight[1, 2] = wrong
    with pytest.raises(RecipeError, match="w holds NaN or infinity"):
        check_finite(weight, "w")
