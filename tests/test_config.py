"""Recipes: a good one loads; every way to get one wrong is one sentence, before torch loads."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from model_folders import write_zeros

import iwopd_megatron
from iwopd_megatron.config.load import load_recipe
from iwopd_megatron.config.models import Layout
from iwopd_megatron.config.preflight import describe
from iwopd_megatron.errors import RecipeError
from iwopd_megatron.records.resume import check_resume

HF = dict(
    model_type="qwen3_moe",
    vocab_size=512,
    num_attention_heads=4,
    num_key_value_heads=2,
    num_hidden_layers=4,
    intermediate_size=128,
    num_local_experts=8,
    moe_intermediate_size=32,
    hidden_size=64,
    head_dim=16,
    rms_norm_eps=1e-6,
    max_position_embeddings=40960,
    num_experts_per_tok=2,
    norm_topk_prob=True,
    rope_theta=1e6,
    eos_token_id=1,
)
DENSE = {k: v for k, v in HF.items() if "expert" not in k and "topk" not in k} | {
    "model_type": "qwen3"
}

VLLM = ["rollout.engine=vllm", "rollout.servers.start=1"]


@pytest.fixture
def recipe(tmp_path) -> Path:
    """A recipe that loads; each test spoils one thing."""
    for name, config in (("moe", HF), ("dense", DENSE), ("other", HF | {"vocab_size": 500})):
        write_zeros(tmp_path / name, config)
    (tmp_path / "empty").mkdir()
    (tmp_path / "train.jsonl").write_text("{}\n")
    tree = {
        "out": str(tmp_path / "run"),
        "student": {"hf": str(tmp_path / "moe")},
        "teacher": {"hf": str(tmp_path / "moe")},
        "data": {"train": str(tmp_path / "train.jsonl")},
        "train": {"rounds": 5},
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def refusal(path: Path, *overrides: str) -> str:
    with pytest.raises(RecipeError) as error:
        load_recipe(path, list(overrides))
    message = str(error.value)
    assert "\n" not in message and message.endswith((".", "?")) and len(message) < 400
    return message


def spoil(path: Path, change) -> None:
    tree = yaml.safe_load(path.read_text())
    change(tree)
    path.write_text(yaml.safe_dump(tree))


def test_valid(recipe):
    loaded = load_recipe(recipe, ["train.lr=1e-3", "student.parallel.ep=2", "processes=4"])
    assert loaded.train.lr == 1e-3 and loaded.train.rounds == 5
    assert loaded.student.parallel == Layout(ep=2) and loaded.world == 4
    assert loaded.loss.weighting.rule == "iw" and loaded.loss.weighting.gamma == 0.5
    assert loaded.loss.aggregation == "seq_mean_token_mean"
    assert load_recipe(recipe).world == 1


def test_override_makes_a_section_and_null(recipe):
    loaded = load_recipe(recipe, ["checkpoint.every=null", "loss.weighting.rule=uniform"])
    assert loaded.checkpoint.every is None and loaded.loss.weighting.rule == "uniform"


def test_layout_arithmetic():
    assert Layout(tp=2, ep=4, etp=1, pp=2).unit == 8
    assert Layout(tp=2, cp=2, ep=2).unit == 4
    assert Layout(tp=4, cp=2).microbatch_multiple == 16 and Layout(tp=4).microbatch_multiple == 4
    assert Layout(cp=4).token_multiple == 8 and Layout(tp=4).token_multiple == 1
    assert describe(Layout(tp=2, ep=2)) == "tp2 ep2" and describe(Layout()) == "of one process"


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["train.lrr=1"], ["unknown key 'train.lrr'", "did you mean 'lr'?"]),
        (["loss.weighting.gama=1"], ["'loss.weighting.gama'", "did you mean 'gamma'?"]),
        (["teacher.ofload=true"], ["'teacher.ofload'", "did you mean 'offload'?"]),
        (["trian.rounds=1"], ["unknown key 'trian'", "did you mean 'train'?"]),
        (["zzz.rounds=1"], ["unknown key 'zzz'", "known keys: out, student"]),
        (["train.rounds=many"], ["'train.rounds'", "'many'", "integer"]),
        (["train.lr=-1"], ["'train.lr'", "-1", "greater than 0"]),
        (["train.rounds=0"], ["'train.rounds'", "greater than 0"]),
        (["student=5"], ["'student' is 5"]),
        (["loss.weighting.rule=iww"], ["'loss.weighting.rule'", "'iww'", "'uniform', 'iw'"]),
        (["student.parallel.tp=3"], ["student: tp=3", "num_attention_heads (4)", "1, 2, 4"]),
        (["student.parallel.tp=4"], ["student: tp=4", "num_key_value_heads (2)", "1, 2."]),
        (["student.parallel.ep=3"], ["student: ep=3", "number of experts (8)", "1, 2, 4, 8"]),
        (["student.parallel.etp=3"], ["student: etp=3", "moe_intermediate_size (32)"]),
        (["student.parallel.vpp=2"], ["vpp=2 needs pp >= 2", "vpp=1 or pp=2"]),
        (["student.parallel.pp=3"], ["pp x vpp=3", "num_hidden_layers (4)", "1, 2, 4"]),
        (["student.parallel.pp=2", "student.parallel.vpp=4"], ["pp x vpp=8", "(4)"]),
        (["student.parallel.pp=3"], ["write account_for_embedding_in_pipeline_split=true and"]),
        (["student.parallel.pipeline_model_parallel_layout=7"], ["layout' is 7; write text"]),
        (["student.parallel.num_layers_in_first_pipeline_stage=0"], ["is 0", "greater than 0"]),
        (["student.parallel.pipeline_model_parallel_layout=tttt"], ["student: ", "the one E"]),
        (["student.parallel.tp=2", "processes=3"], ["processes=3", "multiple of 2", "tp2"]),
        (["train.warmup_rounds=5"], ["warmup_rounds=5", "smaller than train.rounds=5"]),
        (["train.lr"], ["override 'train.lr' is not key=value", "write e.g."]),
        (["=3"], ["override '=3' is not key=value"]),
        (["out.name=3"], ["override 'out.name=3'", "'out' holds a value"]),
        (["train.lr=[1"], ["override 'train.lr=[1'", "YAML value"]),
        (["train.lr=.nan"], ["'train.lr' is nan"]),
        (["train.lr=.inf"], ["'train.lr' is inf"]),
        (["loss.weighting.gamma=.inf"], ["'loss.weighting.gamma' is inf"]),
        (["train.betas=[2.0, 0.9]"], ["train.betas"]),
        (["loss.weighting.alpha=0"], ["'loss.weighting.alpha' is 0", "greater than 0"]),
        (["loss.weighting.alpha=1.5"], ["'loss.weighting.alpha' is 1.5", "equal to 1"]),
        (["loss.weighting.start=0"], ["'loss.weighting.start' is 0", "greater than 0"]),
        (["loss.weighting.end=2"], ["'loss.weighting.end' is 2", "equal to 1"]),
        (["loss.advantage=topk_kl"], ["expected gradient", "zero", "write loss.objective=topk_kl"]),
        (["loss.objective=topk_kl", "loss.extrapolation=1.2"], ["extrapolation=1.2", "advantage"]),
        (["loss.objective=topk_kl", "loss.topk.k=513"], ["loss.topk.k=513", "vocabulary of 512"]),
        (["loss.objective=topk_kl", "gates.on_bad_sample=drop"], ["write on_bad_sample=stop"]),
        (["loss.topk.support=all"], ["'loss.topk.support'", "'renormalised', 'tail'"]),
        (["loss.extrapolation=0"], ["'loss.extrapolation' is 0", "greater than 0"]),
        (["loss.extrapolation=1.2", "student.random_init=0"], ["base student", "base.hf=FOLDER"]),
        (["loss.dual_clip=1"], ["'loss.dual_clip' is 1", "greater than 1"]),
        (["loss.mask_special_tokens=true"], ["'loss.mask_special_tokens'", "'all_but_eos'"]),
        (["train.minibatches=3"], ["train.minibatches=3", "prompts_per_round=1024", "divide"]),
        (["rollout.routing_replay=true"], ["returns the experts", "hf does not", "engine=sglang"]),
        (
            ["rollout.bf16_products=true", "rollout.engine=vllm", "rollout.servers.start=1"],
            ["rollout.bf16_products", "rollout.servers.args"],
        ),
        (
            ["rollout.bf16_products=true", "student.dtype=bf16"],
            ["student.dtype=bf16 multiplies", "rollout.bf16_products=false"],
        ),
        (["rollout.top_p=0"], ["'rollout.top_p' is 0", "greater than 0"]),
        ([*VLLM, "rollout.top_p=0.9"], ["rollout.top_p=0.9", "write rollout.top_p=1"]),
        (["loss.weighting.anneal=cos"], ["'loss.weighting.anneal'", "'cosine' or 'linear'"]),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else None,
)  # fmt: skip
def test_refused_override(recipe, overrides, words):
    message = refusal(recipe, *overrides)
    for word in words:
        assert word in message


def test_missing_keys(recipe):
    spoil(recipe, lambda tree: tree.pop("out"))
    assert "'out' is missing" in refusal(recipe)
    assert "'student.hf' is missing" in refusal(recipe, "out=x", "student={}")
    assert "'data.train' is missing" in refusal(recipe, "out=x", "data={}")


def test_dense_student_takes_no_experts(recipe):
    dense = f"student.hf={recipe.parent / 'dense'}"
    message = refusal(recipe, dense, "student.parallel.ep=2")
    assert "student is a dense model" in message and "ep=1 etp=1" in message
    engine = ["rollout.engine=sglang", "rollout.servers.start=1", "rollout.routing_replay=true"]
    message = refusal(recipe, dense, *engine)
    assert "routing_replay needs a student with experts" in message
    spoil(recipe, lambda tree: tree["student"].update(parallel={"tp": 2}))
    assert load_recipe(recipe, [dense]).student.parallel.tp == 2


def test_teacher_must_fit_the_layout(recipe):
    dense = f"teacher.hf={recipe.parent / 'dense'}"
    load_recipe(recipe, [dense, "student.parallel.ep=2"])  # a dense teacher leaves ep alone
    write_zeros(recipe.parent / "other", HF | {"num_hidden_layers": 3})
    message = refusal(recipe, f"teacher.hf={recipe.parent / 'other'}", "student.parallel.pp=2")
    assert message.startswith("teacher: pp x vpp=2 does not divide num_hidden_layers (3)")
    assert message.endswith(", or give it a layout of its own, teacher.service.parallel.")
    uneven = ["student.parallel.pp=2", "student.parallel.pipeline_model_parallel_layout=Et|t*3L"]
    message = refusal(recipe, f"teacher.hf={recipe.parent / 'other'}", *uneven)
    assert "places 4 layers (t), num_hidden_layers is 3; write as many, or give it a" in message


def test_folders(recipe):
    folder = recipe.parent
    message = refusal(recipe, "student.hf=/nowhere/model")
    assert "/nowhere/model does not exist" in message
    message = refusal(recipe, f"teacher.hf={folder / 'empty'}")
    assert f"{folder / 'empty'} has no config.json" in message
    (folder / "empty" / "config.json").write_text("{")
    assert "is not valid JSON" in refusal(recipe, f"student.hf={folder / 'empty'}")
    (folder / "empty" / "config.json").write_text('{"model_type": "gptj"}')
    message = refusal(recipe, f"student.hf={folder / 'empty'}")
    assert "model_type 'gptj' is not supported; use one of qwen3, qwen3_moe," in message


@pytest.mark.parametrize("missing", ["vocab_size", "num_key_value_heads", "moe_intermediate_size"])
def test_incomplete_config_json(recipe, missing):
    config = {k: v for k, v in HF.items() if k != missing}
    (recipe.parent / "moe" / "config.json").write_text(json.dumps(config))
    message = refusal(recipe)
    assert missing in message and "config.json" in message


def test_config_json_holds_an_object(recipe):
    (recipe.parent / "moe" / "config.json").write_text("[1]")
    assert "config.json" in refusal(recipe)


def test_vocabularies_must_match(recipe):
    message = refusal(recipe, f"teacher.hf={recipe.parent / 'other'}")
    assert "teacher vocab_size=500" in message and "student's 512" in message


def test_base_student_of_extrapolation(recipe):
    """By default what training starts from; loaded where it is read, checked like a teacher."""
    assert load_recipe(recipe).base_model is None
    loaded = load_recipe(recipe, ["loss.extrapolation=1.25"])
    assert loaded.base_model.hf == loaded.student.hf and loaded.base is None
    other = f"base.hf={recipe.parent / 'other'}"
    assert load_recipe(recipe, [other]).base_model is None
    message = refusal(recipe, other, "loss.extrapolation=1.25")
    assert message.startswith("base vocab_size=500 differs from the student's 512")


def test_steps_per_round(recipe):
    assert load_recipe(recipe).steps_per_round == 1
    assert load_recipe(recipe, ["train.minibatches=4", "train.epochs=2"]).steps_per_round == 8


@pytest.mark.parametrize("name", ["train", "eval"])
def test_data_file_must_exist(recipe, name):
    message = refusal(recipe, f"data.{name}=/nowhere/x.jsonl")
    assert f"data.{name}: file /nowhere/x.jsonl does not exist" in message


def test_unreadable_recipes(recipe):
    assert "does not exist" in refusal(recipe.with_name("absent.yaml"))
    recipe.write_text("out: [1\nstudent: }")
    assert "is not valid YAML" in refusal(recipe)
    recipe.write_bytes(b"out: \xff\xfe")
    assert "is not valid YAML" in refusal(recipe)
    recipe.write_text("- out\n- student\n")
    assert "must hold 'key: value' lines, not a list" in refusal(recipe)
    recipe.write_text("")
    assert "is missing" in refusal(recipe)


def python(folder: Path, *args: str) -> subprocess.CompletedProcess:
    """Run python where `import torch` ends the process with code 99."""
    (folder / "torch.py").write_text("raise SystemExit(99)\n")
    package = Path(iwopd_megatron.__file__).parents[1]
    env = os.environ | {"PYTHONPATH": f"{folder}{os.pathsep}{package}"}
    return subprocess.run([sys.executable, *args], env=env, capture_output=True, text=True)


def test_config_imports_no_torch(tmp_path):
    code = "import sys, iwopd_megatron.cli.main; print('torch' in sys.modules)"
    result = python(tmp_path, "-c", code)
    assert (result.returncode, result.stdout) == (0, "False\n"), result.stderr


def test_command_line_refuses_with_one_line(recipe):
    args = ["-m", "iwopd_megatron", "train", str(recipe), "train.lrr=1"]
    result = python(recipe.parent, *args)
    assert result.returncode == 2 and result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line == f"error: {recipe}: unknown key 'train.lrr'; did you mean 'lr'?"


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["train.min_lr=1"], ["train.min_lr=1.0", "train.lr"]),
        (["train.microbatch_tokens=500"], ["microbatch_tokens=500", "18432", "raise it"]),
        (["rollout.max_response_tokens=40000", "train.microbatch_tokens=50000"], ["40960"]),
    ],
)
def test_sizes_that_cannot_work(recipe, overrides, words):
    message = refusal(recipe, *overrides)
    assert all(word in message for word in words)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("use_sliding_window", True),
        ("hidden_act", "gelu"),
        ("attention_bias", True),
        ("rope_parameters", {"rope_type": "longrope", "rope_theta": 1e6}),
        ("mlp_only_layers", [0]),
    ],
)
def test_unsupported_model_settings(recipe, key, value):
    (recipe.parent / "moe" / "config.json").write_text(json.dumps(HF | {key: value}))
    message = refusal(recipe)
    assert "is not supported" in message and "config.json" in message


@pytest.mark.parametrize("name", ["tokenizer.json", "model.safetensors"])
def test_model_folders_must_be_complete(recipe, name):
    (recipe.parent / "moe" / name).unlink()
    assert name in refusal(recipe)


def test_random_init_needs_no_weights(recipe):
    tree = recipe.parent / "other"
    (tree / "config.json").write_text(json.dumps(HF))
    (tree / "model.safetensors").unlink()
    assert load_recipe(recipe, [f"student.hf={tree}", "student.random_init=0"])


def test_teacher_must_end_answers_like_the_student(recipe):
    other = recipe.parent / "other"
    write_zeros(other, HF)
    load_recipe(recipe, [f"teacher.hf={other}"])
    (other / "generation_config.json").write_text('{"eos_token_id": [1, 2]}')
    message = refusal(recipe, f"teacher.hf={other}")
    assert "the teacher ends answers with [1, 2], the student only with [1]" in message


def test_resume_refuses_other_settings(recipe):
    loaded = load_recipe(recipe)
    check_resume(loaded)  # nothing there yet
    loaded.out.mkdir()
    (loaded.out / "recipe.yaml").write_text(yaml.safe_dump(loaded.model_dump(mode="json")))
    allowed = ["train.rounds=50", "student.parallel.ep=2", "evaluate.every=3", "processes=4"]
    check_resume(load_recipe(recipe, allowed))
    for change in ("train.lr=3e-3", "train.seed=7", "loss.weighting.rule=uniform"):
        with pytest.raises(RecipeError, match=f"{change.split('=')[0]} is .* started with"):
            check_resume(load_recipe(recipe, [change]))
