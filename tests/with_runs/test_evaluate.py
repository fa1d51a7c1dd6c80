"""Evaluation while training: several benchmarks by name, several answers a problem."""

import os
from pathlib import Path

import pytest
import torch
from worlds import run_world

from iwopd_megatron.config.load import load_recipe
from iwopd_megatron.data.run_data import load_run_data
from iwopd_megatron.errors import RecipeError
from iwopd_megatron.parity.hf_reference import hf_model
from iwopd_megatron.records.runlog import read_metrics
from iwopd_megatron.report.data import find_runs
from iwopd_megatron.report.page import write_report
from iwopd_megatron.report.summary import summarise
from iwopd_megatron.runtime.parallel import initialise, shutdown
from iwopd_megatron.train.progress import Progress
from iwopd_megatron.train.trainer import Trainer

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def at_root(monkeypatch):
    monkeypatch.chdir(ROOT)


def recipe_of(out, *words):
    own = out.parent / "mine.jsonl"
    rows = (ROOT / "recipes/demo/eval.jsonl").read_text().splitlines()
    own.write_text("\n".join(rows[:8]) + "\n")
    settings = [
        f"out={out}",
        "student.parallel={}",
        "train.rounds=1",
        "train.warmup_rounds=0",
        "train.prompts_per_round=8",
        "evaluate.problems=8",
        "evaluate.benchmarks=[mine,toy]",
        f"data.benchmarks={{mine: {{path: {own}}}}}",
    ]
    return load_recipe(ROOT / "recipes/demo_tiny_moe.yaml", [*settings, *words])


def train(recipes):
    os.chdir(ROOT)
    for recipe in recipes:
        parallel = initialise(recipe.student.parallel, recipe.train.seed)
        with Progress(1, visible=False) as progress:
            assert Trainer(recipe, parallel, progress).run()
    shutdown()


def evaluations(out):
    return [line for line in read_metrics(out) if line["kind"] == "eval"]


def test_benchmarks_by_name_and_mean_at_n(tmp_path):
    words = {
        "one": ("evaluate.problems=512",), "first": (), "four": ("evaluate.samples=4",),
        "named": ("data.eval=null",),
    }  # fmt: skip
    run_world(1, train, [recipe_of(tmp_path / name, *more) for name, more in words.items()])
    one, first, four, named = (evaluations(tmp_path / name)[0] for name in words)
    # the toy benchmark holds the 512 problems of data.eval, and mine the first eight of them
    assert one["accuracy_toy"] == one["accuracy"] == first["accuracy_toy"] > 0
    assert first["accuracy_mine"] == first["accuracy"] == one["accuracy_mine"]
    assert (first["problems"], four["problems"]) == (8, 32)
    assert four["accuracy_mine"] == four["accuracy"]
    assert four["accuracy_toy"] != first["accuracy_toy"]  # other answers
    assert four["accuracy_toy"] == pytest.approx(first["accuracy_toy"], abs=0.05)
    assert named["accuracy"] == (named["accuracy_mine"] + named["accuracy_toy"]) / 2
    assert [line["round"] for line in evaluations(tmp_path / "one")] == [0, 1]
    write_report(tmp_path / "one")
    drawn = {file.stem for file in (tmp_path / "one" / "figures").iterdir()}
    assert {"accuracy_mine", "accuracy_toy"} <= drawn


def test_an_unknown_benchmark_is_one_sentence(tmp_path):
    recipe = recipe_of(tmp_path / "run", "evaluate.benchmarks=[nowhere]", "data.eval=null")
    with pytest.raises(RecipeError, match="no benchmark 'nowhere'; known ones"):
        load_run_data(recipe)


def run_without_files(recipe, data):
    os.chdir(ROOT)
    parallel = initialise(recipe.student.parallel, recipe.train.seed)
    with Progress(1, visible=False) as progress:
        assert Trainer(recipe, parallel, progress, data=data).run()
    shutdown()


def test_a_world_reads_nothing_that_its_starter_has_read(tmp_path):
    recipe = recipe_of(tmp_path / "run", "evaluate.benchmarks=[mine]")
    data = load_run_data(recipe)
    (tmp_path / "mine.jsonl").unlink()
    run_world(1, run_without_files, recipe, data)
    assert evaluations(tmp_path / "run")[0]["accuracy_mine"] >= 0


def check_distance(recipe):
    """The line's figures against transformers' log-probs of the very answers."""
    os.chdir(ROOT)
    parallel = initialise(recipe.student.parallel, recipe.train.seed)
    with Progress(1, visible=False) as progress:
        trainer = Trainer(recipe, parallel, progress)
        trainer.engine.update(trainer.student.stream, 0)
        trainer.evaluation.scores(trainer.engine)
        answers = trainer.evaluation.main.answers
        found = trainer.supervision.distance(answers)
    student, teacher = (
        [_logps(hf_model(model.hf, torch.float32), one) for one in answers]
        for model in (recipe.student, recipe.teacher)
    )
    gaps = [a - b for a, b in zip(student, teacher, strict=True)]
    assert found["held_out_reverse_kl"] == pytest.approx(torch.cat(gaps).mean().item(), abs=1e-5)
    perplexity = torch.cat(teacher).mean().neg().exp().item()
    assert found["teacher_perplexity"] == pytest.approx(perplexity, rel=1e-4)
    for place in range(64):  # bins of one token: at most 43 are drawn
        own = [gap[place] for gap in gaps if len(gap) > place]
        assert found["tokens_positions"][place] == len(own)
        mean = torch.stack(own).mean().item() if own else None
        expected = None if mean is None else pytest.approx(mean, abs=1e-4)
        assert found["held_out_reverse_kl_positions"][place] == expected
    shutdown()


@torch.no_grad()
def _logps(model, sample):
    ids = torch.tensor([sample.prompt_ids + sample.response_ids])
    logp = model(ids).logits[0, len(sample.prompt_ids) - 1 : -1].log_softmax(-1)
    return logp.gather(-1, torch.tensor(sample.response_ids)[:, None])[:, 0]


def test_held_out_answers_are_scored_by_both_models(tmp_path):
    recipe = recipe_of(tmp_path / "run", "evaluate.reverse_kl=true", "evaluate.benchmarks=[]")
    run_world(1, check_distance, recipe)
    run_world(1, train, [recipe])
    first, last = evaluations(tmp_path / "run")
    assert 0 < last["held_out_reverse_kl"] < first["held_out_reverse_kl"]
    assert 1 < last["teacher_perplexity"] < first["teacher_perplexity"]
    write_report(tmp_path / "run")
    drawn = {file.stem for file in (tmp_path / "run" / "figures").iterdir()}
    assert {"held_out_reverse_kl", "teacher_perplexity", "held_out_by_position"} <= drawn
    row = summarise(find_runs([tmp_path / "run"]))["arms"]["run"]
    assert row["teacher_perplexity_final"] == last["teacher_perplexity"]


def test_nothing_to_score_is_one_sentence(tmp_path):
    with pytest.raises(RecipeError, match="evaluate.reverse_kl is of answers to data.eval"):
        recipe_of(tmp_path / "run", "evaluate.reverse_kl=true", "data.eval=null")
