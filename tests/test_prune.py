"""A model without some layers is what transformers computes without them, byte by byte the rest."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from damage import on_disk, random_bits, write_folder
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from iwopd_megatron.cli import main as cli
from iwopd_megatron.errors import RecipeError
from iwopd_megatron.files import rawfile
from iwopd_megatron.hf.folder import check_model
from iwopd_megatron.weights import pieces, shards
from iwopd_megatron.weights.prune import drop_layers

SMALL = dict(
    vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=5, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8, max_position_embeddings=64, pad_token_id=0, eos_token_id=1,
    bos_token_id=None,
)  # fmt: skip
MOE = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)
WINDOW = dict(use_sliding_window=True, sliding_window=3, max_window_layers=2)
FAMILIES = {
    "qwen3": ("Qwen3", {}),
    "qwen3 tied": ("Qwen3", {"tie_word_embeddings": True}),
    "qwen3 with windows": ("Qwen3", WINDOW),
    "qwen3_moe": ("Qwen3Moe", MOE | {"norm_topk_prob": True}),
    "qwen3_moe, some layers dense": ("Qwen3Moe", MOE | {"mlp_only_layers": [1, 3]}),
    "llama tied": ("Llama", {"tie_word_embeddings": True}),
    "gpt_oss": ("GptOss", {"num_local_experts": 4, "sliding_window": 3}),
    "smollm3": ("SmolLM3", {}),
}


def small_folder(folder: Path, family: str) -> Path:
    """A random model of a family, as transformers saves it."""
    name, settings = FAMILIES[family]
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**SMALL | settings)
    model = getattr(transformers, f"{name}ForCausalLM")(config)
    for parameter in model.parameters():
        parameter.data.normal_(std=0.2)
    model.save_pretrained(folder)
    return folder


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(2, 26).view(2, 12), use_cache=False).logits


def removed(folder: Path, dropped: set[int]) -> torch.nn.Module:
    """The model as transformers loads it whole, with the layers taken out of its list."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    kept = [x for i, x in enumerate(model.model.layers) if i not in dropped]
    model.model.layers = torch.nn.ModuleList(kept)
    config = model.model.config
    if getattr(config, "layer_types", None):
        config.layer_types = [x for i, x in enumerate(config.layer_types) if i not in dropped]
    config.num_hidden_layers = len(kept)
    return model


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dropped", [{1}, {0, 2, 3}])
def test_transformers_has_the_same_logits(family, dropped, tmp_path):
    source = small_folder(tmp_path / "hf", family)
    drop_layers(source, tmp_path / "out", dropped)
    model, report = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(report.values()), report
    assert len(model.model.layers) == 5 - len(dropped)
    found, whole = logits(model), logits(AutoModelForCausalLM.from_pretrained(source))
    assert torch.equal(found, logits(removed(source, dropped)))
    assert (found - whole).abs().max() > 0.01


def test_shards_in_and_out(moe_folder, tmp_path, monkeypatch):
    """Tensors dealt over files, in pieces of a few rows, into several files: the same bytes."""
    monkeypatch.setattr(pieces, "PIECE_BYTES", 1000)
    monkeypatch.setattr(shards, "SHARD_BYTES", 60_000)
    tensors = random_bits(on_disk(moe_folder), torch.bfloat16)
    source = write_folder(tmp_path / "hf", moe_folder, tensors, files=4)
    result = drop_layers(source, tmp_path / "out", {0, 2})
    assert (result.before, result.after) == (4, 2)
    assert (tmp_path / "out" / "model.safetensors.index.json").is_file()
    found = on_disk(tmp_path / "out")
    assert len(found) == result.tensors and sum(x.nbytes for x in found.values()) == result.nbytes
    for name, tensor in found.items():
        old = name.replace("layers.0.", "layers.1.") if "layers.0." in name else name
        old = old.replace("layers.1.", "layers.3.") if "layers.1." in name else old
        assert rawfile.raw(tensor) == rawfile.raw(tensors[old]), name
    check_model_without_tokenizer = pytest.raises(RecipeError, match="no tokenizer.json")
    with check_model_without_tokenizer:
        check_model(tmp_path / "out")
    (tmp_path / "out" / "tokenizer.json").touch()
    assert check_model(tmp_path / "out").num_hidden_layers == 2


def test_scaled_weights_keep_their_scales(dense_folder, tmp_path):
    tensors = on_disk(dense_folder)
    scaled = "model.layers.3.mlp.up_proj.weight"
    tensors[scaled] = tensors[scaled].to(torch.float8_e4m3fn)
    tensors[f"{scaled}_scale"] = torch.tensor(0.5)  # no dimension
    source = write_folder(tmp_path / "hf", dense_folder, tensors)
    config = json.loads((source / "config.json").read_text())
    names = ["lm_head", "model.layers.0.mlp", "model.layers.1.mlp", "model.layers.2"]
    config["quantization_config"] = {"quant_method": "fp8", "modules_to_not_convert": names}
    (source / "config.json").write_text(json.dumps(config))
    drop_layers(source, tmp_path / "out", {0})
    found = load_file(tmp_path / "out" / "model.safetensors")
    new = scaled.replace("3", "2")
    assert torch.equal(found[new].view(torch.uint8), tensors[scaled].view(torch.uint8))
    assert found[f"{new}_scale"].shape == () and found[f"{new}_scale"] == 0.5
    kept = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert kept["modules_to_not_convert"] == ["lm_head", "model.layers.0.mlp", "model.layers.1"]


def test_companions_are_carried_and_a_manifest_is_not(dense_folder, tmp_path):
    source = write_folder(tmp_path / "hf", dense_folder, on_disk(dense_folder))
    texts = {"tokenizer.json": "{}", "chat_template.jinja": "{{ x }}", "LICENSE": "free"}
    for name, text in {**texts, "manifest.json": "{}"}.items():
        (source / name).write_text(text)
    drop_layers(source, tmp_path / "out", {1})
    own = {"config.json", "generation_config.json", "model.safetensors"}
    assert {x.name for x in (tmp_path / "out").iterdir()} == set(texts) | own
    assert all((tmp_path / "out" / name).read_text() == text for name, text in texts.items())
    ours, theirs = (json.loads((x / "config.json").read_text()) for x in (source, tmp_path / "out"))
    changed = {key for key in ours if ours[key] != theirs.get(key)}
    assert changed <= {"num_hidden_layers", "layer_types", "max_window_layers"}
    assert theirs.keys() == ours.keys()


def test_what_an_interrupted_run_left_goes_away(dense_folder, tmp_path):
    partial = tmp_path / "out.partial"
    partial.mkdir()
    (partial / "model-00001-of-00009.safetensors").write_text("of another model")
    drop_layers(dense_folder, tmp_path / "out", {1})
    assert not partial.exists()
    assert [x.name for x in (tmp_path / "out").glob("*.safetensors")] == ["model.safetensors"]


def run(*words: object) -> tuple[int, str]:
    result = CliRunner().invoke(cli.app, [str(word) for word in words])
    return result.exit_code, result.output


def test_the_command(dense_folder, tmp_path):
    code, text = run("prune", dense_folder, tmp_path / "out", "--drop", "0, 2-3")
    assert code == 0 and text.startswith(f"wrote {tmp_path / 'out'}: 1 of 4 layers, 14 tensors")
    first, only = on_disk(dense_folder), on_disk(tmp_path / "out")
    name = "model.layers.{}.self_attn.q_proj.weight".format
    assert torch.equal(only[name(0)], first[name(1)])


@pytest.mark.parametrize(
    ("drop", "sentence"),
    [
        ("4", "has no layer 4; its 4 layers are 0 to 3"),
        ("1-9", "has no layer 4; its 4 layers are 0 to 3"),
        ("0-3", "all 4 layers of"),
        ("1,1", "names layer 1 twice; name it once"),
        ("2,1-3", "names layer 2 twice; name it once"),
        ("3-1", "'3-1' is no layer; write numbers and ranges"),
        ("", "'' is no layer; write numbers and ranges"),
        ("1,two", "'two' is no layer; write numbers and ranges"),
        ("-1", "'-1' is no layer; write numbers and ranges"),
    ],
)
def test_layers_that_cannot_be_dropped(drop, sentence, dense_folder, tmp_path, monkeypatch, capsys):
    words = ["iwopd", "prune", str(dense_folder), str(tmp_path / "out"), f"--drop={drop}"]
    refuse(words, sentence, tmp_path, monkeypatch, capsys)


def refuse(words, sentence, folder, monkeypatch, capsys):
    """One sentence, exit code 2, and nothing is there that was not."""
    before = sorted(folder.rglob("*"))
    monkeypatch.setattr("sys.argv", words)
    with pytest.raises(SystemExit) as left:
        cli.main()
    said = capsys.readouterr()
    (line,) = said.err.splitlines()
    assert left.value.code == 2 and line.startswith("error: ") and sentence in line
    assert said.out == "" and sorted(folder.rglob("*")) == before


def _beside(tensors):
    tensors["model.vision.blocks.0.weight"] = torch.zeros(2)


def _lost(tensors):
    for name in [name for name in tensors if ".layers.3." in name]:
        del tensors[name]


def _more(tensors):
    tensors["model.layers.4.eh_proj.weight"] = torch.zeros(2)


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (_beside, "model.vision.blocks.0.weight has a number and is none of model.layers.N"),
        (_lost, "num_hidden_layers=4, but the tensors lack model.layers.3"),
        (_more, "num_hidden_layers=4, but the tensors have model.layers.4"),
    ],
)
def test_folders_that_cannot_lose_layers(
    damage, sentence, dense_folder, tmp_path, monkeypatch, capsys
):
    tensors = on_disk(dense_folder)
    damage(tensors)
    source = write_folder(tmp_path / "hf", dense_folder, tensors)
    words = ["iwopd", "prune", str(source), str(tmp_path / "out"), "--drop", "1"]
    refuse(words, sentence, tmp_path, monkeypatch, capsys)


def test_other_folders(dense_folder, tmp_path, monkeypatch, capsys):
    def say(source, sentence, out="out"):
        words = ["iwopd", "prune", str(source), str(tmp_path / out), "--drop", "1"]
        refuse(words, sentence, tmp_path, monkeypatch, capsys)

    say(tmp_path / "nowhere", "does not exist; point it at a Hugging Face model folder")
    source = Path(shutil.copytree(dense_folder, tmp_path / "hf"))
    say(source, "already exists; choose another folder, or add --force", out="hf")
    (source / "adapter_config.json").write_text("{}")
    say(source, "merge them into the model and save it whole")
    (source / "adapter_config.json").unlink()
    (source / "config.json").write_text('{"model_type": "llava", "text_config": {}}')
    say(source, "has no num_hidden_layers of its own")
    (source / "model.safetensors").write_bytes(b"")
    (source / "config.json").write_text('{"model_type": "qwen3", "num_hidden_layers": 4}')
    say(source, "cannot be read as safetensors")


def test_an_output_is_replaced_only_with_force(dense_folder, tmp_path):
    (tmp_path / "out").mkdir()
    save_file({"x": torch.zeros(1)}, tmp_path / "out" / "model.safetensors")
    shutil.copy(dense_folder / "config.json", tmp_path / "out")
    with pytest.raises(RecipeError, match="already exists"):
        drop_layers(dense_folder, tmp_path / "out", {1})
    drop_layers(dense_folder, tmp_path / "out", {1}, force=True)
    assert "model.norm.weight" in on_disk(tmp_path / "out")
