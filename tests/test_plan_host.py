"""What a run needs of this machine's memory: refused before it starts, with a knob that helps."""

import json
import re
import subprocess
import sys

import pytest

from iwopd_megatron.config.recipe import Recipe
from iwopd_megatron.errors import RecipeError
from iwopd_megatron.plan.activations import activation_bytes
from iwopd_megatron.plan.host import Needs
from iwopd_megatron.plan.host_check import check
from iwopd_megatron.runtime import host
from iwopd_megatron.toy_task import SYMBOLS, problems, write_jsonl, write_tokenizer

GIB = 2**30
QWEN3_06B = {
    "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "vocab_size": 151936,
    "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28,
    "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "rms_norm_eps": 1e-6,
    "max_position_embeddings": 40960, "rope_theta": 1e6, "tie_word_embeddings": True,
    "hidden_act": "silu", "pad_token_id": 0, "eos_token_id": 1,
}  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    place = tmp_path / "model"
    place.mkdir()
    (place / "config.json").write_text(json.dumps(QWEN3_06B))
    return place


def recipe(folder, **sections):
    tree = {
        "out": folder / "run",
        "student": {"hf": folder},
        "teacher": {"hf": folder, "offload": True},
        "data": {"train": "train.jsonl"},
        "rollout": {"max_prompt_tokens": 32, "max_response_tokens": 512},
        "train": {"prompts_per_round": 4},
    }
    for name, values in sections.items():
        tree[name] = tree.get(name, {}) | values
    return Recipe.model_validate(tree)


def test_states_of_one_process_are_sixteen_bytes_a_parameter(folder):
    needs = Needs(recipe(folder), 1)
    assert needs.states == 16 * needs.student.parameters
    assert needs.scorer_weights == 4 * needs.student.parameters
    assert needs.engine_weights == 0 and needs.saving == 0


def test_shards_and_data_parallel_ranks_need_copies(folder):
    """The engine's own weights where the student is cut; Megatron's collecting where dp > 1."""
    cut = Needs(recipe(folder, student={"parallel": {"tp": 2}}), 2)
    assert cut.engine_weights == 4 * cut.student.parameters
    two = Needs(_two(folder), 2)
    assert two.engine_weights == 0
    assert two.saving == 26 * two.student.parameters
    assert two.phases["saving"] > Needs(_two(folder), 1).phases["saving"]


def _two(folder):
    return recipe(folder).model_copy(update={"processes": 2})


def test_a_run_that_does_not_fit_is_refused_with_a_knob(folder):
    given = recipe(folder)
    with pytest.raises(RecipeError) as error:
        check(given, 16 * GIB)
    text = str(error.value)
    assert re.search(
        r"the run needs \d+\.\d GiB of this machine's memory and 16\.0 are there", text
    )
    assert "training" in text and "generation" in text
    assert "write train.microbatch_tokens=544, or gates.host_memory=false" in text
    check(recipe(folder, train={"microbatch_tokens": 544}), 16 * GIB)
    check(given, Needs(given, 1).most)
    check(recipe(folder, gates={"host_memory": False}), GIB)


def test_where_no_knob_suffices_the_best_is_named(folder):
    with pytest.raises(RecipeError, match=r"begin with train.microbatch_tokens=544, which leaves"):
        check(recipe(folder), 4 * GIB)
    small = {"microbatch_tokens": 544}
    with pytest.raises(RecipeError, match=r"take a smaller student.hf or a machine with more"):
        check(recipe(folder, train=small, student={"recompute": "full"}), 4 * GIB)


def test_the_command_refuses_before_it_writes_anything(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    huge = QWEN3_06B | {"vocab_size": len(SYMBOLS), "hidden_size": 16384, "num_hidden_layers": 200}
    (folder / "config.json").write_text(json.dumps(huge))
    write_tokenizer(folder)
    rows = (row for row, _ in zip(problems(1, slip=0.0), range(8), strict=False))
    write_jsonl(tmp_path / "train.jsonl", rows)
    (tmp_path / "recipe.yaml").write_text(
        f"out: {tmp_path}/run\nstudent: {{hf: {folder}, random_init: 1}}\n"
        f"data: {{train: {tmp_path}/train.jsonl}}\n"
        "rollout: {max_prompt_tokens: 16, max_response_tokens: 40}\n"
    )
    command = [sys.executable, "-m", "iwopd_megatron", "sft", str(tmp_path / "recipe.yaml")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2, done.stderr
    assert re.search(r"error: the run needs \d+\.\d GiB of this machine's memory", done.stderr)
    assert not (tmp_path / "run/metrics.jsonl").exists()
    assert not (tmp_path / "run/recipe.yaml").exists()


@pytest.mark.parametrize("version", [1, 2])
def test_a_control_groups_limit_counts(version, tmp_path, monkeypatch):
    """Of the group itself or one above; file pages that can be dropped are free."""
    proc, groups = tmp_path / "proc", tmp_path / "cgroup"
    (proc / "self").mkdir(parents=True)
    (proc / "meminfo").write_text("MemTotal: 9 kB\nMemAvailable:    8388608 kB\n")
    monkeypatch.setattr(host, "PROC", proc)
    monkeypatch.setattr(host, "GROUPS", groups)
    assert host.available() == 8 * GIB
    root = groups / "memory" if version == 1 else groups
    kinds = "memory" if version == 1 else ""
    (proc / "self/cgroup").write_text(f"4:{kinds}:/job/step\n")
    names = ["memory.limit_in_bytes", "memory.usage_in_bytes"]
    names = names if version == 1 else ["memory.max", "memory.current"]
    for place, most, used in (("job/step", "max", GIB), ("job", 4 * GIB, 3 * GIB)):
        (root / place).mkdir(parents=True, exist_ok=True)
        for name, value in zip(names, (most, used), strict=True):
            (root / place / name).write_text(f"{value}\n")
        stat = "total_inactive_file" if version == 1 else "inactive_file"
        (root / place / "memory.stat").write_text(f"anon 5\n{stat} {GIB}\n")
    assert host.available() == 2 * GIB


def test_the_fullest_stage_may_be_between_the_ends(folder):
    """26 of 28 layers on the second of three stages: its states and activations count."""
    stages = {"pp": 3, "pipeline_model_parallel_layout": "Et|t*26|tL"}
    needs = Needs(recipe(folder, student={"parallel": stages}), 3)
    assert needs.states == 16 * needs.student.share(needs.layout, 1).total
    given = needs.student, needs.layout, int(needs.micro_batch), "none"
    assert needs.learning["activations"] == max(activation_bytes(*given, stage=1, width=4))


@pytest.mark.parametrize("version", [1, 2])
def test_cores_are_those_that_the_control_group_grants_over_the_processes(
    version, tmp_path, monkeypatch
):
    """Of the group itself or one above, in whole cores; one at least."""
    proc, groups = tmp_path / "proc", tmp_path / "cgroup"
    (proc / "self").mkdir(parents=True)
    monkeypatch.setattr(host, "PROC", proc)
    monkeypatch.setattr(host, "GROUPS", groups)
    monkeypatch.setattr(host.os, "sched_getaffinity", lambda _: set(range(16)))
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert host.own_cores() == 16
    (proc / "self/cgroup").write_text("3:cpu,cpuacct:/job/step\n" if version == 1 else "0::/job\n")
    folder = groups / ("cpu/job" if version == 1 else "job")
    folder.mkdir(parents=True)

    def grant(quota):
        if version == 1:
            (folder / "cpu.cfs_quota_us").write_text(f"{quota}\n")
            (folder / "cpu.cfs_period_us").write_text("100000\n")
        else:
            (folder / "cpu.max").write_text(f"{'max' if quota < 0 else quota} 100000\n")

    grant(-1)
    assert host.own_cores() == 16
    grant(650_000)
    assert host.own_cores() == 6
    for processes, cores in (("2", 3), ("4", 1), ("8", 1)):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", processes)
        assert host.own_cores() == cores
