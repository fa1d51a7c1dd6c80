"""The folder of Megatron-Bridge and ms-swift: as they write it, read whole, refused in a sentence.

bridge_tables.json holds what they saved themselves (tests/with_bridge/record.py).
"""

import json
import pickle
import sys
from pathlib import Path

import pytest
import torch
import yaml
from damage import on_disk
from safetensors.torch import load_file, save_file

from iwopd_megatron.errors import RecipeError
from iwopd_megatron.evaluation.target import open_target
from iwopd_megatron.files.rawfile import raw
from iwopd_megatron.hf.config import read_hf_config
from iwopd_megatron.parity.rehearse import write_model
from iwopd_megatron.weights.convert import hf_to_megatron, megatron_to_hf
from iwopd_megatron.weights.torch_dist.reader import CheckpointReader

HERE = Path(__file__).parent
TABLES = json.loads((HERE / "bridge_tables.json").read_text())
sys.path.insert(0, str(HERE / "with_bridge"))
from bridges import MODELS, write_hf  # noqa: E402
from record import table  # noqa: E402


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """(Hugging Face folder, our root for the bridges) of each model."""
    place = tmp_path_factory.mktemp("bridge")
    found = {}
    for name in MODELS:
        found[name] = write_hf(place / name, name), place / f"{name}-root"
        hf_to_megatron(*found[name], "bridge")
    return found


@pytest.mark.parametrize("program", TABLES)
@pytest.mark.parametrize("name", MODELS)
def test_keys_shapes_and_objects_are_theirs(folders, program, name):
    assert table(folders[name][1] / "iter_0000000") == TABLES[program][name]


@pytest.mark.parametrize("name", MODELS)
def test_root_and_iteration_come_back_whole(folders, name, tmp_path):
    source, root = folders[name]
    for checkpoint in (root, root / "iter_0000000"):
        megatron_to_hf(checkpoint, tmp_path / checkpoint.name)
        got, want = on_disk(tmp_path / checkpoint.name), on_disk(source)
        assert got.keys() == want.keys()
        assert all(raw(got[key]) == raw(want[key]) for key in want)
    hf_to_megatron(source, root, "bridge", force=True)  # a root is a checkpoint's folder


def test_what_surrounds_the_checkpoint(folders):
    root = folders["moe"][1]
    iteration = root / "iter_0000000"
    state = torch.load(root / "latest_train_state.pt")
    assert state["step"].item() == 0 and state["do_train"].dtype == torch.bool
    args = torch.load(iteration / "common.pt", weights_only=False)["args"]
    assert (args.tensor_model_parallel_size, args.no_save_optim) == (1, True)
    content = yaml.safe_load((iteration / "run_config.yaml").read_text())
    assert content["checkpoint"] == {
        "save_optim": False, "save_rng": False, "fully_parallel_save": True,
    }  # fmt: skip
    model = content["model"]
    assert model["hf_model_id"] == content["tokenizer"]["tokenizer_model"] == str(iteration / "hf")
    assert model["params_dtype"] == {"_target_": "torch.bfloat16", "_call_": False}
    assert (model["moe_router_pre_softmax"], model["init_method_std"]) == (False, 0.03)
    assert (model["position_embedding_type"], model["yarn_rotary_scaling_factor"]) == ("yarn", 4)


def test_linear_rotary_is_named_and_other_settings_are_refused(folders, tmp_path):
    source = write_hf(tmp_path / "hf", "dense")
    config = json.loads((source / "config.json").read_text())

    def written(**rope):
        content = config | {"rope_parameters": rope | {"rope_theta": 1e4}}
        (source / "config.json").write_text(json.dumps(content))
        hf_to_megatron(source, tmp_path / "root", "bridge", force=True)
        run_config = tmp_path / "root/iter_0000000/run_config.yaml"
        return yaml.safe_load(run_config.read_text())["model"]

    assert written(rope_type="linear", factor=3.0)["seq_len_interpolation_factor"] == 3
    assert "seq_len_interpolation_factor" not in written(rope_type="default")
    yarn = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=64)
    llama3 = dict(yarn, rope_type="llama3", low_freq_factor=1.0, high_freq_factor=4.0)
    for rope in (llama3, dict(yarn, attention_factor=1.5)):
        with pytest.raises(RecipeError, match=r"no model with its rotary settings \((yarn|llama3)"):
            written(**rope)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("latest", "says 'latest', neither an iteration nor 'release'"),
        ("7", "names iter_0000007, which is not there"),
        ("release", "names release, which is not there"),
    ],
)
def test_a_tracker_that_cannot_be_followed(folders, tmp_path, text, sentence):
    (tmp_path / "latest_checkpointed_iteration.txt").write_text(text)
    with pytest.raises(RecipeError, match=sentence):
        megatron_to_hf(tmp_path, tmp_path / "out", folders["moe"][0])
    with pytest.raises(RecipeError, match=sentence), open_target(tmp_path, [], None):
        pass


def test_iterations_without_a_tracker_are_named(folders, tmp_path):
    (tmp_path / "iter_0000010").mkdir()
    with pytest.raises(RecipeError, match="name one of its checkpoints, e.g. .*/iter_0000010"):
        megatron_to_hf(tmp_path, tmp_path / "out", folders["moe"][0])


def test_eval_opens_a_root(folders):
    source, root = folders["dense"]
    with open_target(root, [], None) as target:
        assert read_hf_config(target.folder) == read_hf_config(source)


def padded(folder: Path, tmp_path: Path, **model) -> Path:
    """A checkpoint of a folder whose vocabulary has 32 rows more, as its run_config.yaml says."""
    wide = tmp_path / "wide"
    write_model(wide, MODELS["dense"] | {"vocab_size": 544})
    tensors = {key: x.bfloat16() for key, x in load_file(wide / "model.safetensors").items()}
    for key, tensor in load_file(folder / "model.safetensors").items():
        tensors[key][: len(tensor)] = tensor
    save_file(tensors, wide / "model.safetensors", metadata={"format": "pt"})
    hf_to_megatron(wide, tmp_path / "root", "bridge")
    iteration = tmp_path / "root/iter_0000000"
    (iteration / "manifest.json").unlink()
    content = yaml.safe_load((iteration / "run_config.yaml").read_text())
    content["model"] |= model
    (iteration / "run_config.yaml").write_text(yaml.safe_dump(content))
    return tmp_path / "root"


def test_padding_of_the_vocabulary_is_left_out(folders, tmp_path):
    source = folders["dense"][0]
    root = padded(source, tmp_path, vocab_size=512, should_pad_vocab=True)
    megatron_to_hf(root, tmp_path / "out", source)
    got, want = on_disk(tmp_path / "out"), on_disk(source)
    assert all(raw(got[key]) == raw(want[key]) for key in want)


@pytest.mark.parametrize("model", [{"should_pad_vocab": True}, {"vocab_size": 512}])
def test_rows_that_are_no_padding_are_refused(folders, tmp_path, model):
    source = folders["dense"][0]
    root = padded(source, tmp_path, **model)
    sentence = r"embedding.word_embeddings.weight is \(544, 64\), config.json implies \(512, 64\)"
    with pytest.raises(RecipeError, match=sentence):
        megatron_to_hf(root, tmp_path / "out", source)


def test_optimiser_states_beside_the_weights_are_passed_over(folders, tmp_path):
    """Bridge's training checkpoints have them, and generators, in the same folder."""
    source, root = folders["tied"]
    file = root / "iter_0000000/.metadata"
    before = file.read_bytes()
    metadata = pickle.loads(before)
    items = metadata.state_dict_metadata
    for key in list(items):
        items[f"optimizer.state.exp_avg.{key}"] = items[key]
    items["rng_state/shard_0.0_1.1"] = items["decoder.final_layernorm.weight"]
    file.write_bytes(pickle.dumps(metadata))
    assert not any("exp_avg" in key for key in CheckpointReader(root / "iter_0000000").tensors)
    megatron_to_hf(root, tmp_path / "out", source)
    file.write_bytes(before)
    assert raw(on_disk(tmp_path / "out")["model.norm.weight"])
