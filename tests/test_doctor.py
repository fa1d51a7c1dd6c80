"""The objective linter: a sentence for each setting that does nothing, none for a sound recipe."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from iwopd_megatron.config import doctor
from iwopd_megatron.config.load import load_recipe, read_recipe
from iwopd_megatron.config.loss import WeightingRule

ROOT = Path(__file__).parent.parent
SEVERAL = ["train.minibatches=2"]  # the clip can bind
DENSE = ["loss.objective=topk_kl", "loss.topk.k=8"]


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch):
    monkeypatch.chdir(ROOT)


def findings(*overrides):
    return doctor.findings(load_recipe(Path("recipes/demo_tiny_moe.yaml"), list(overrides)))


@pytest.mark.parametrize("path", sorted(Path("recipes").glob("*.yaml")), ids=lambda p: p.stem)
def test_no_recipe_begins_with_a_note(path):
    """A first reader could not act on a note about what the recipe does not set."""
    assert doctor.findings(read_recipe(path)) == []


def test_a_sound_recipe_has_none():
    assert findings(*SEVERAL) == []
    assert findings(*DENSE) == []


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (
            ["loss.clip=0.1"],
            ["loss.clip cannot bind", "one optimiser step a round", "train.minibatches"],
        ),
        (["loss.dual_clip=3.0"], ["loss.dual_clip cannot bind"]),
        (["loss.dual_clip=3.0", "loss.clip=0.1"], ["loss.clip and loss.dual_clip cannot bind"]),
        ([*SEVERAL, "loss.tis_cap=null"], ["truncated importance sampling is off", "engine=hf"]),
        ([*SEVERAL, "rollout.top_p=0.9"], ["rollout.top_p=0.9", "topk_kl"]),
        ([*SEVERAL, "loss.topk.k=8"], ["loss.topk is read by loss.objective=topk_kl only"]),
        (
            [*DENSE, "loss.topk.support=truncated"],
            ["neither renormalisation nor a tail bucket", "not a divergence"],
        ),
        ([*DENSE, "loss.clip=0.1"], ["loss.clip is read by", "policy only"]),
        ([*DENSE, "loss.tis_cap=2"], ["loss.tis_cap is read by"]),
        ([*SEVERAL, "base.hf=recipes/demo/student"], ["base does nothing", "extrapolation=1"]),
        (
            [*SEVERAL, "loss.weighting.alpha=0.1"],
            ["loss.weighting.alpha=0.1 does nothing under rule 'iw'", "ratio, ratio_blend would"],
        ),
        ([*SEVERAL, "loss.weighting.rule=uniform", "loss.weighting.gamma=2"], ["gamma=2.0 does"]),
        (
            [*SEVERAL, "loss.weighting.rule=log_ratio", "loss.weighting.alpha=0.1"],
            ["alpha=0.1 does nothing under rule 'log_ratio'"],
        ),
        ([*SEVERAL, "loss.weighting.gamma=0"], ["gamma=0 makes rule 'iw' the same as uniform"]),
        (
            [*SEVERAL, "loss.weighting.rule=prefix", "loss.weighting.share=1"],
            ["share=1 makes rule 'prefix' weigh all tokens the same"],
        ),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else None,
)
def test_finding(overrides, words):
    (found,) = findings(*overrides)
    assert found.endswith(".") and "\n" not in found
    for word in words:
        assert word in found


def test_long_prompts():
    assert doctor.long_prompts(20, 100, 2048) == []
    (found,) = doctor.long_prompts(21, 100, 2048)
    assert found.startswith(
        "21 of 100 prompts (21%) are longer than rollout.max_prompt_tokens=2048"
    )


def test_a_rule_reads_just_the_settings_that_change_its_weights():
    """Change each setting of each rule; the weights move where `doctor` says it is read."""
    import torch

    from iwopd_megatron.loss.weighting import RULES, ratio_mean, token_weights_packed

    assert set(doctor.READS) == set(RULES)
    gap = torch.linspace(-3, 2, 20).flip(0)
    other = dict(
        gamma=0.9,
        alpha=0.5,
        share=0.7,
        denominator="inclusive",
        start=0.55,
        end=0.2,
        anneal="linear",
    )

    def weights(rule, **changed):
        settings = WeightingRule(rule=rule).model_dump() | changed
        mean = ratio_mean([gap.tolist(), [1.0] * 20], settings["alpha"])
        return token_weights_packed(
            gap,
            torch.zeros(20).long(),
            torch.ones(20).bool(),
            step=4,
            total_steps=10,
            ratio_mean=mean,
            **settings,
        )

    for rule in RULES:
        for name, value in other.items():
            moves = not torch.equal(weights(rule), weights(rule, **{name: value}))
            assert moves == (name in doctor.READS[rule]), (rule, name)


def run_doctor(*overrides):
    command = [sys.executable, "-W", "ignore", "-m", "iwopd_megatron", "doctor"]
    return subprocess.run(
        [*command, "recipes/demo_tiny_moe.yaml", *overrides],
        capture_output=True,
        text=True,
        env=os.environ,
    )


def test_command():
    result = run_doctor("loss.extrapolation=1.25", "rollout.max_prompt_tokens=8")
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert lines[0].startswith("objective: ExOPD lambda 1.25; weights iw gamma=0.5 denominator=")
    assert "importance weight capped at 5" in lines[0]
    assert "every response counts the same" in lines[0] and "1 optimiser step a round" in lines[0]
    assert lines[1].startswith("data: 0 prompts of at most 8 tokens")
    assert lines[2].startswith("note: ") and "(100%) are longer than" in lines[2]
    refused = run_doctor("loss.advantage=topk_kl")
    assert refused.returncode == 2 and len(refused.stderr.splitlines()) == 1
