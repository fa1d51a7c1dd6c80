"""What a resumed run may change: each setting follows its new value, or is refused by name."""

import json

import pytest
import yaml
from worlds import run_world

from iwopd_megatron.cli.compare import _check_start
from iwopd_megatron.config.models import Layout
from iwopd_megatron.config.recipe import Recipe, Train
from iwopd_megatron.data.problems import Problem
from iwopd_megatron.errors import RecipeError
from iwopd_megatron.hf.config import read_hf_config
from iwopd_megatron.loss.weighting import scheduled_share
from iwopd_megatron.models.gpt import build_model
from iwopd_megatron.models.optimizer import build_optimizer, build_scheduler, wrap_data_parallel
from iwopd_megatron.records.resume import MAY_CHANGE, check_resume, check_start
from iwopd_megatron.runtime.local_world import local_context
from iwopd_megatron.runtime.parallel import initialise
from iwopd_megatron.train import checkpoint
from iwopd_megatron.train.compare import Arm
from iwopd_megatron.train.saver import Saver
from iwopd_megatron.weights.hf_reader import HfTensors, load_shards

# A recipe with a value at every key, so that each can be changed.
SERVICE = {"parallel": {}, "processes": 1}
TEACHER = {"hf": "teacher", "offload": True, "microbatch_tokens": 512, "service": SERVICE}
STUDENT = {"hf": "student", "random_init": 1, "megatron": {"moe_permute_fusion": True}}
EVERYTHING = {
    "out": "RUN", "student": STUDENT, "teacher": TEACHER,
    "base": {"hf": "base", "microbatch_tokens": 512}, "processes": 1,
    "data": {
        "train": [{"path": "train.jsonl"}], "eval": "eval.jsonl", "held_out": ["aime24"],
        "benchmarks": {"mine": {"path": "mine.jsonl"}},
    },
    "rollout": {"sync_folder": "weights", "servers": {"args": {"a": 1}, "env": {"b": "c"}}},
    "loss": {"dual_clip": 3.0}, "wandb": {"project": "x", "entity": "y", "group": "z"},
    "cluster": {"trainer": 1},
}  # fmt: skip
FOLLOWS = {  # every key that `MAY_CHANGE` frees; the rest is refused
    "out",
    "processes",
    "student.recompute",
    "student.megatron.*",
    "data.benchmarks.mine.*",
    "train.rounds",
    "train.microbatch_tokens",
    "student.parallel.*",
    "teacher.offload",
    "teacher.microbatch_tokens",
    "teacher.urls",
    "teacher.service.*",
    "teacher.timeout_s",
    "teacher.patience_s",
    "teacher.max_in_flight",
    "base.offload",
    "base.microbatch_tokens",
    "rollout.batch_size",
    "rollout.threads",
    "rollout.servers.*",
    "rollout.sync",
    "rollout.sync_folder",
    "rollout.sync_address",
    "rollout.pause",
    "rollout.verify_every",
    "rollout.stream_scoring",
    "evaluate.*",
    "checkpoint.*",
    "gates.*",
    "cluster.*",
    "wandb.*",
}


def flat(tree, prefix=""):
    out = {}
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            out |= flat(value, f"{prefix}{key}.")
        else:
            out[prefix + key] = value
    return out


def changed(tree, key, value):
    name, _, rest = key.partition(".")
    return tree | {name: changed(tree[name], rest, value) if rest else value}


def other(key, value):
    """Another value of the same kind."""
    choices = {
        "loss.weighting.rule": "uniform",
        "loss.weighting.denominator": "inclusive",
        "loss.weighting.anneal": "linear",
        "loss.objective": "topk_kl",
        "cluster.gpu": "h200",
        "loss.advantage": "topk_kl",
        "loss.aggregation": "token_mean",
        "rollout.engine": "vllm",
        "loss.mask_special_tokens": "all",
        "loss.topk.support": "tail",
        "wandb.mode": "offline",
        "rollout.sync": "tensor",
        "rollout.pause": "in_place",
        "train.schedule": "cosine",
        "student.recompute": "full",
        "rollout.max_staleness": 1,
        "gates.on_bad_sample": "drop",
        "train.betas": [0.8, 0.9],
        "data.train": [{"path": "other.jsonl"}],
        "teachers": None,
    }
    if key in choices:
        return choices[key]
    if key.endswith("dtype"):
        return "bf16"
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value / 2 if value and isinstance(value, float) else value + 1
    if isinstance(value, list):
        return [*value, "x"]
    return f"{value}x" if isinstance(value, str) else None


def is_among(key, names):
    return any(key == name or (name[-1] == "*" and key.startswith(name[:-1])) for name in names)


@pytest.fixture
def run(tmp_path):
    """(recipe, its run folder, which has begun)"""
    (tmp_path / "run").mkdir()
    recipe = Recipe.model_validate(EVERYTHING | {"out": str(tmp_path / "run")})
    store(recipe.model_dump(mode="json"), tmp_path / "run")
    return recipe, tmp_path / "run"


def store(tree, folder):
    (folder / "recipe.yaml").write_text(yaml.safe_dump(tree))


def test_every_setting_follows_or_is_refused(run):
    """FOLLOWS and MAY_CHANGE name the same keys, and each of all others stops a resumption."""
    recipe, folder = run
    tree = recipe.model_dump(mode="json")
    seen = set()
    for key, value in flat(tree).items():
        new = other(key, value)
        if new is None:
            continue
        store(changed(tree, key, new), folder)
        seen.add(key)
        if is_among(key, FOLLOWS):
            check_resume(recipe)
        else:
            with pytest.raises(RecipeError, match=rf"^{key}(\.0\.\w+)? is .* was started with"):
                check_resume(recipe)
    for name in (
        "train.lr",
        "train.min_lr",
        "train.warmup_rounds",
        "train.weight_decay",
        "train.betas",
        "train.eps",
        "train.clip_grad",
        "train.schedule",
        "train.seed",
        "loss.weighting.gamma",
        "loss.weighting.rule",
        "train.epochs",
    ):
        assert name in seen and not is_among(name, FOLLOWS)
    assert len(seen) > 100
    for free in MAY_CHANGE:
        assert any(name.removesuffix(".*").startswith(free) for name in FOLLOWS), free


@pytest.mark.parametrize(
    "more", [{"teachers": {"math": {"hf": "x"}}}, {"base": {"hf": "base"}}, {"teacher": TEACHER}]
)
def test_a_section_that_was_not_there_is_a_change(more, tmp_path):
    """Fine-tuning does not become distillation, nor OPD ExOPD, in one run."""
    tree = {"out": str(tmp_path), "student": {"hf": "x"}, "data": {"train": "y"}}
    store(Recipe.model_validate(tree).model_dump(mode="json"), tmp_path)
    with pytest.raises(RecipeError, match="was started with None"):
        check_resume(Recipe.model_validate(tree | more))


def test_a_setting_of_a_newer_version_had_its_default(run):
    recipe, folder = run
    tree = recipe.model_dump(mode="json")
    del tree["train"]["clip_grad"]
    store(tree, folder)
    check_resume(recipe)
    with pytest.raises(RecipeError, match="train.clip_grad is 2.0 but"):
        check_resume(recipe.model_copy(update={"train": Train(clip_grad=2.0)}))


@pytest.mark.parametrize("content", ["a: [", "- 1", "zzz: 1"])
def test_a_damaged_recipe_of_the_run(content, run):
    recipe, folder = run
    (folder / "recipe.yaml").write_text(content)
    with pytest.raises(RecipeError, match=r"recipe.yaml .*\.$"):
        check_resume(recipe)


def train_recipe(folder, **train):
    tree = {"out": str(folder), "student": {"hf": "x"}, "data": {"train": "y"}, "train": train}
    return Recipe.model_validate(tree)


@pytest.mark.parametrize("there", [None, "hf", "events.jsonl"])
def test_a_run_that_never_was_is_not_resumed(there, tmp_path):
    folder = tmp_path / "run"
    if there is not None:
        (folder / there).mkdir(parents=True)
    with pytest.raises(RecipeError, match="--resume: no run was started in .*leave --resume out"):
        check_start(train_recipe(folder), True)
    arms = [Arm("a", 1, train_recipe(folder)), Arm("b", 1, train_recipe(tmp_path / "b"))]
    with pytest.raises(RecipeError, match="--resume: no run of this comparison was started in"):
        _check_start(arms, tmp_path, True)
    assert folder.exists() == (there is not None)


@pytest.mark.parametrize("trace", ["lock", "recipe.yaml", "metrics.jsonl", "launch"])
def test_a_run_that_was_stopped_before_it_saved_begins_again(trace, tmp_path):
    recipe = train_recipe(tmp_path / "run")
    recipe.out.mkdir()
    if trace == "launch":
        (recipe.out / trace).mkdir()
    elif trace == "recipe.yaml":
        store(recipe.model_dump(mode="json"), recipe.out)
    else:
        (recipe.out / trace).touch()
    check_start(recipe, True)
    other_arm = Arm("b", 1, train_recipe(tmp_path / "b"))
    _check_start([Arm("a", 1, recipe), other_arm], tmp_path, True)


def test_fewer_rounds_than_are_trained_are_refused(tmp_path):
    (tmp_path / "checkpoints/round_000004").mkdir(parents=True)
    (tmp_path / "checkpoints/round_000009.partial").mkdir()
    for rounds in (4, 8):
        check_resume(train_recipe(tmp_path, rounds=rounds))
    with pytest.raises(RecipeError, match="train.rounds=3 but .* already trained for 4"):
        check_resume(train_recipe(tmp_path, rounds=3))


def test_a_run_that_kept_nothing_is_not_trained_again_from_its_start(tmp_path):
    """Its results would be lost."""
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf/config.json").touch()
    line = {"kind": "round", "round": 4}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    check_resume(train_recipe(tmp_path, rounds=4))
    with pytest.raises(RecipeError, match="ended after round 4 and kept no checkpoint"):
        check_resume(train_recipe(tmp_path, rounds=8))


BEFORE = {"rounds": 4, "lr": 4e-4, "schedule": "cosine", "min_lr": 1e-5, "warmup_rounds": 1}


def learning_rates(folder, run, queue):
    """Of rounds 5 to 8 after a resumption with other rounds, and of a run of 8 rounds."""
    parallel = initialise(Layout())
    hf = read_hf_config(folder)

    def begin(**train):
        chunks = build_model(hf, parallel)
        load_shards(chunks, HfTensors(folder), hf, parallel)
        settings = Train(**BEFORE | train)
        wrapped = wrap_data_parallel(chunks, settings)
        optimizer = build_optimizer(wrapped, settings)
        return wrapped, optimizer, build_scheduler(optimizer, settings)

    def rounds(parts, first, last):
        found = []
        for _ in range(first, last + 1):
            found.append(parts[1].param_groups[0]["lr"])
            parts[2].step(1)
        return found

    whole = begin(rounds=8)
    expected = rounds(whole, 1, 8)
    half = begin()
    rounds(half, 1, 4)
    checkpoint.save(Saver(run, 1, False, parallel), *half, {"world": 1, "round": 4}, parallel)
    again = begin(rounds=8)
    checkpoint.load(checkpoint.newest(run, parallel, print), *again, parallel)
    decay = {group["weight_decay"] for group in again[1].param_groups}
    queue.put((expected, rounds(again, 5, 8), decay))


def test_more_rounds_move_the_horizon_of_the_learning_rate(moe_folder, tmp_path):
    queue = local_context().SimpleQueue()
    run_world(1, learning_rates, moe_folder, tmp_path, queue)
    expected, found, decay = queue.get()
    assert found == expected[4:] and found[0] > 1e-4 and found[-1] == pytest.approx(1e-5)
    assert decay <= {0.0, Train().weight_decay} and max(decay) == Train().weight_decay


def test_more_rounds_move_the_horizon_of_a_scheduled_weighting():
    """Supervision asks with the rounds that are done and the recipe's: nothing of it is stored."""
    assert scheduled_share(4, 4, 0.3, 1.0, "linear") == 1.0
    assert scheduled_share(4, 8, 0.3, 1.0, "linear") == pytest.approx(0.65)


def test_the_digest_tells_other_prompts_and_their_order():
    problems = [(Problem(letter, "1", 0.0, "math"), [i, 2]) for i, letter in enumerate("ab")]
    digest = checkpoint.digest_of(problems)
    assert digest == checkpoint.digest_of(list(problems))
    assert digest != checkpoint.digest_of(problems[::-1])
    assert digest != checkpoint.digest_of(problems[:1])
