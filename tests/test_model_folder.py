"""Every way a model folder is unfit is one sentence, whoever reads it."""

import json
import shutil

import pytest
import torch
from model_folders import write_zeros
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from iwopd_megatron.cli.main import app
from iwopd_megatron.errors import RecipeError
from iwopd_megatron.hf.folder import check_model, check_weights, eos_ids
from iwopd_megatron.parity.hf_reference import hf_model
from iwopd_megatron.weights.convert import hf_to_megatron
from iwopd_megatron.weights.hf_reader import HfTensors

HEAD, EMBEDDING, Q = (
    "lm_head.weight",
    "model.embed_tokens.weight",
    "model.layers.0.self_attn.q_proj.weight",
)


@pytest.fixture
def folder(moe_folder, tmp_path):
    (tmp_path / "model").mkdir()
    for file in moe_folder.iterdir():
        shutil.copy(file, tmp_path / "model")
    (tmp_path / "model/tokenizer.json").write_text("{}")
    return tmp_path / "model"


def rewrite(folder, change, file="model.safetensors"):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / file, metadata={"format": "pt"})


UNFIT = {
    "an extra tensor": (lambda t: t.update(extra=torch.ones(1)), "has the tensor 'extra'"),
    "a missing tensor": (lambda t: t.pop(Q), f"has no tensor '{Q}'"),
    "a shape": (lambda t: t.update({Q: t[Q][:-1].clone()}), f"{Q} is (63, 64), config.json"),
    "a transposed shape": (
        lambda t: t.update({EMBEDDING: t[EMBEDDING].t().contiguous()}), "is (64, 512), config"),
    "int8": (lambda t: t.update({Q: t[Q].to(torch.int8)}), f"{Q} is I8; only F64, F32"),
    "all int8": (lambda t: t.update({k: v.to(torch.int8) for k, v in t.items()}), "is I8; only"),
    "int64": (lambda t: t.update({Q: t[Q].to(torch.int64)}), f"{Q} is I64; only"),
    "bool": (lambda t: t.update({Q: t[Q] > 0}), f"{Q} is BOOL; only"),
    "fp8 without scales": (
        lambda t: t.update({Q: t[Q].to(torch.float8_e4m3fn)}), "has no quantization_config"),
    "a bias": (lambda t: t.update({Q[:-6] + "bias": torch.ones(64)}), "q_proj.bias', which"),
    "a layer more": (
        lambda t: t.update({Q.replace("0", "4", 1): t[Q].clone()}), "layers.4.self_attn"),
}  # fmt: skip


@pytest.mark.parametrize("case", UNFIT)
def test_unfit_weights_are_refused_by_every_reader(folder, tmp_path, case):
    change, words = UNFIT[case]
    rewrite(folder, change)
    readers = (
        check_model,
        HfTensors,
        lambda place: hf_to_megatron(place, tmp_path / "out"),
    )
    for reader in readers:
        with pytest.raises(RecipeError) as error:
            reader(folder)
        assert words in str(error.value) and str(error.value).endswith(".")
    assert not (tmp_path / "out").exists()


RECIPE = "recipes/demo_tiny_moe.yaml"


@pytest.mark.usefixtures("in_the_repository")
@pytest.mark.parametrize(
    "command",
    [
        ["train", RECIPE, "out={out}", "student.hf={folder}"],
        ["train", RECIPE, "out={out}", "teacher.hf={folder}"],
        ["train", RECIPE, "out={out}", "base.hf={folder}", "loss.extrapolation=1.2"],
        ["compare", RECIPE, "student.hf={folder}", "--out", "{out}"],
        ["serve-teacher", RECIPE, "teacher.hf={folder}", "teacher.service={{}}"],
        ["eval", "{folder}", "--bench", "toy"],
        ["eval", RECIPE, "student.hf={folder}", "--bench", "toy"],
        ["parity", "{folder}"],
        ["convert", "{folder}", "{out}"],
    ],
    ids=lambda words: " ".join(words[:4]),
)
def test_every_command_refuses_before_anything_starts(tmp_path, command):
    """The demo's student, with an extra tensor."""
    folder, out = tmp_path / "model", tmp_path / "out"
    shutil.copytree("recipes/demo/student", folder)
    rewrite(folder, lambda tensors: tensors.update(extra=torch.ones(1)))
    words = [word.format(folder=folder, out=out) for word in command]
    result = CliRunner().invoke(app, words)
    assert isinstance(result.exception, RecipeError), result.output
    assert "has the tensor 'extra', which its config.json does not imply" in str(result.exception)
    assert not out.exists()


def with_index(folder, file="model-00001-of-00001.safetensors", change=lambda tensors: None):
    """An index beside `model.safetensors`, of a shard with other weights."""
    rewrite(folder, lambda tensors: [tensors[name].mul_(2) for name in tensors], file)
    names = dict.fromkeys(load_file(folder / file), file)
    change(names)
    text = json.dumps({"metadata": {}, "weight_map": names})
    (folder / "model.safetensors.index.json").write_text(text)


def test_a_single_file_wins_over_a_stale_index(folder):
    with_index(folder)
    weight = dict(hf_model(folder, torch.float32).named_parameters())[Q]
    assert torch.equal(HfTensors(folder)[Q][:], weight)
    (folder / "model.safetensors").unlink()
    assert torch.equal(HfTensors(folder)[Q][:], 2 * weight)


INDEXED = {
    "a file that is not there": (
        lambda names: names.update({Q: "model-00002-of-00002.safetensors"}),
        "00002-of-00002.safetensors cannot be read as safetensors: No such file"),
    "another file": (lambda names: names.update({Q: "other.safetensors"}), "lacks the tensor"),
    "a tensor that no file has": (
        lambda names: names.update(more=names[Q]), "lacks the tensor 'more' of the index"),
    "a file elsewhere": (lambda names: names.update({Q: "../x.safetensors"}), "beside the index"),
    "no file": (lambda names: names.update({Q: 3}), "is not a safetensors index"),
    "nothing": (lambda names: names.clear(), "is not a safetensors index"),
}  # fmt: skip


@pytest.mark.parametrize("case", INDEXED)
def test_indexes_that_lie(folder, case):
    change, words = INDEXED[case]
    save_file({"unread": torch.ones(1)}, folder / "other.safetensors")
    with_index(folder, change=change)
    (folder / "model.safetensors").unlink()
    with pytest.raises(RecipeError) as error:
        check_model(folder)
    assert words in str(error.value)


def cut_short(data):
    return data[:-100]


def without_header(data):
    return b"\xff" * 8 + data[8:]


def changed_header(old, new):
    """As long as before, so that the data stays where it is."""
    return lambda data: data.replace(old, new.ljust(len(old)), 1)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (cut_short, "its tensors end at byte"),
        (lambda data: data + b"more", "its tensors end at byte"),
        (lambda data: data[:5], "model.safetensors cannot be read"),
        (lambda data: b"", "model.safetensors cannot be read"),
        (without_header, "its header would end at byte"),
        (lambda data: data[:8] + b"[" + data[9:], "model.safetensors cannot be read"),
        (changed_header(b'"F32"', b'"F99"'), "its dtype 'F99' is unknown"),
        (changed_header(b'"F32"', b'"F16"'), "a tensor of shape"),
    ],
)
def test_damaged_files(folder, change, words):
    file = folder / "model.safetensors"
    file.write_bytes(change(file.read_bytes()))
    with pytest.raises(RecipeError) as error:
        check_model(folder)
    assert words in str(error.value) and str(error.value).endswith("copy the original file.")


def test_an_adapter_is_no_model(folder):
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(RecipeError, match="merge them into the model"):
        check_model(folder)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_tied_head_must_be_the_embedding(tied_folder, tmp_path, dtype):
    shutil.copy(tied_folder / "config.json", tmp_path)
    tensors = {k: v.to(dtype) for k, v in load_file(tied_folder / "model.safetensors").items()}
    hf = check_with(tmp_path, tensors | {HEAD: tensors[EMBEDDING].clone()})
    assert hf.tie_word_embeddings and HEAD not in HfTensors(tmp_path)
    other = tensors[EMBEDDING].clone()
    other[-1, -1] += 1
    for head in (other, tensors[EMBEDDING].to(torch.float64)):
        with pytest.raises(RecipeError, match="differs from model.embed_tokens.weight although"):
            check_with(tmp_path, tensors | {HEAD: head})


def check_with(folder, tensors):
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "tokenizer.json").write_text("{}")
    return check_model(folder)


def test_end_of_answer_ids(tmp_path):
    config = dict(
        model_type="qwen3",
        vocab_size=32,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=8,
        rms_norm_eps=1e-6,
        max_position_embeddings=64,
    )
    write_zeros(tmp_path, config)
    with pytest.raises(RecipeError, match="neither config names an eos_token_id"):
        eos_ids(tmp_path)
    write_zeros(tmp_path, config | {"eos_token_id": 3})
    assert eos_ids(tmp_path) == {3}
    generation = tmp_path / "generation_config.json"
    for ids, expected in ((None, {3}), ([4, 5], {4, 5}), (0, {0})):
        generation.write_text(json.dumps({"eos_token_id": ids}))
        assert eos_ids(tmp_path) == expected
    spoiled = {
        "[]": "holds a list",
        '{"eos_token_id": 32}': "not below vocab",
        '{"eos_token_id": "3"}': "must be a token id",
        "{": "is not valid JSON",
    }
    for content, words in spoiled.items():
        generation.write_text(content)
        with pytest.raises(RecipeError, match=words):
            eos_ids(tmp_path)


def test_headers_of_a_folder_say_enough(moe_folder):
    """No weight is read: a folder whose data is elsewhere would do."""
    check_weights(moe_folder, HfTensors(moe_folder).hf)
