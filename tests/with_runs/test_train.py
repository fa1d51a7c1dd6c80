"""The whole loop on the demo: determinism, layouts, resume, signals, fine-tuning, comparison."""

import gc
import json
import shutil
import signal
import time
import weakref
from pathlib import Path

import pytest
import torch
from forked import started
from same_figures import assert_same_figures
from worlds import run_world

from iwopd_megatron.batch.packing import Packer
from iwopd_megatron.config.load import load_recipe
from iwopd_megatron.config.models import Frozen, Layout
from iwopd_megatron.files.run_files import read_records
from iwopd_megatron.hf.config import read_hf_config
from iwopd_megatron.hf.folder import eos_ids
from iwopd_megatron.parity.hf_reference import hf_model, make_samples
from iwopd_megatron.records.runlog import read_metrics
from iwopd_megatron.rollout.embedded import HfEngine
from iwopd_megatron.rollout.engine import Prompt, Sampling
from iwopd_megatron.runtime.local_world import local_context
from iwopd_megatron.runtime.parallel import initialise, shutdown
from iwopd_megatron.teacher.embedded import EmbeddedScorer
from iwopd_megatron.toy_task import write_task
from iwopd_megatron.train.progress import Progress
from iwopd_megatron.train.trainer import Trainer
from iwopd_megatron.weights.convert import megatron_to_hf
from iwopd_megatron.weights.hf_reader import HfTensors

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.usefixtures("in_the_repository")
RECIPE = ROOT / "recipes/demo_tiny_moe.yaml"
SMALL = [
    "train.rounds=5",
    "train.warmup_rounds=2",
    "train.prompts_per_round=16",
    "train.microbatch_tokens=300",
    "evaluate.problems=16",
    "checkpoint.every=3",
]
LAYOUTS = {
    "one": {},
    "tp2_ep2": {"tp": 2, "ep": 2},
    "again": {"tp": 2, "ep": 2},
    "dp2": {},
    "pp2": {"pp": 2},
    "cp2": {"cp": 2},
}


def small_recipe(out, layout, *overrides):
    return load_recipe(RECIPE, [*SMALL, f"out={out}", f"student.parallel={layout}", *overrides])


def train_here(recipes, resume=False):
    for recipe in recipes:
        parallel = initialise(recipe.student.parallel, recipe.train.seed)
        with Progress(recipe.train.rounds, visible=False) as progress:
            trainer = Trainer(recipe, parallel, progress, resume)
            assert trainer.run()
        model = weakref.ref(trainer.student.chunks[0])
        del trainer
        gc.collect()
        assert model() is None, "a run's model outlives the run"
    shutdown()


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The same five rounds in every layout."""
    folder = tmp_path_factory.mktemp("runs")
    recipes = {name: small_recipe(folder / name, layout) for name, layout in LAYOUTS.items()}
    run_world(1, train_here, [recipes.pop("one")])
    run_world(2, train_here, list(recipes.values()))
    return folder


def records(run):
    """Metrics without clock times."""
    return read_records(run / "metrics.jsonl")


def weights(run):
    tensors = HfTensors(run / "hf")
    return {name: tensors[name][:] for name in tensors}


def same_weights(a, b):
    ours, theirs = weights(a), weights(b)
    return ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)


def test_same_seed_same_layout_is_identical(runs):
    ours, theirs = (runs / name / "metrics.jsonl" for name in ("tp2_ep2", "again"))
    assert ours.read_bytes() == theirs.read_bytes()
    assert same_weights(runs / "tp2_ep2", runs / "again")


@pytest.mark.parametrize("name", ["tp2_ep2", "dp2", "pp2", "cp2"])
def test_layouts_follow_the_same_curve(name, runs):
    ours, theirs = records(runs / name), records(runs / "one")
    assert len(ours) == len(theirs) == 7  # five rounds, evaluations at 0 and 5
    for a, b in zip(ours, theirs, strict=True):
        assert a.keys() == b.keys()
        assert a["kind"] == b["kind"]
        assert_same_figures(a, b)


@pytest.mark.parametrize("name", ["one", "tp2_ep2", "pp2"])
def test_a_checkpoint_is_exported_on_its_own(name, runs, tmp_path):
    """Anywhere, without the student's folder: the last one is the run's own export."""
    shutil.copytree(runs / name / "checkpoints/round_000005", tmp_path / "elsewhere")
    megatron_to_hf(tmp_path / "elsewhere", tmp_path / "hf")
    assert same_weights(runs / name, tmp_path)
    for file in (runs / name / "hf").iterdir():
        is_weight = file.suffix == ".safetensors"
        assert is_weight or file.read_bytes() == (tmp_path / "hf" / file.name).read_bytes()


def generate_greedily(folders, queue):
    initialise(Layout())
    prompts = [Prompt(i, [3 + (i + 5 * j) % 12 for j in range(8)] + [2]) for i in range(8)]
    for folder in folders:
        engine = HfEngine(folder, torch.float32, {1}, batch_size=8)
        tensors = HfTensors(folder)
        engine.update(((name, tensors[name][:]) for name in tensors), 0)
        queue.put([s.response_ids for s in engine.generate(prompts, Sampling(43, 0.0))])
    shutdown()


def test_layouts_generate_the_same_greedy_answers(runs):
    queue = local_context().SimpleQueue()
    folders = [runs / name / "hf" for name in LAYOUTS]
    run_world(1, generate_greedily, folders, queue)
    answers = [queue.get() for _ in folders]
    assert all(answer == answers[0] for answer in answers)
    assert len({tuple(ids) for ids in answers[0]}) > 1


def test_training_moves_the_student_towards_the_teacher(runs):
    lines = [line for line in records(runs / "one") if line["kind"] == "round"]
    assert lines[-1]["reverse_kl"] < 0.9 * lines[0]["reverse_kl"]


def test_run_folder_holds_what_the_readme_says(runs):
    run = runs / "tp2_ep2"
    assert load_recipe(run / "recipe.yaml").student.parallel == Layout(tp=2, ep=2)
    assert list((run / "tensorboard").glob("events*"))
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == [
        "round_000003",
        "round_000005",
    ]
    sample = json.loads((run / "samples/round_000005.jsonl").read_text().splitlines()[0])
    assert len(sample["tokens"]) == len(sample["gap"]) == len(sample["weight"])
    assert "".join(sample["tokens"]) == sample["response"]


def as_after_round_3(run, out):
    """A copy of a run of five rounds without its last checkpoint and its export."""
    shutil.copytree(run, out, ignore=shutil.ignore_patterns("round_000005"))
    shutil.rmtree(out / "hf")


def resumed_after(run):
    return [e["round"] for e in read_records(run / "events.jsonl") if e["event"] == "resumed"]


def test_resume_with_several_steps_a_round_is_identical(variants, tmp_path):
    original = variants / "several steps/tp2_ep2"
    as_after_round_3(original, tmp_path / "run")
    recipe = small_recipe(tmp_path / "run", LAYOUTS["tp2_ep2"], *VARIANTS["several steps"])
    run_world(2, train_here, [recipe], True)
    assert resumed_after(tmp_path / "run") == [3]
    assert records(tmp_path / "run") == records(original)
    assert same_weights(tmp_path / "run", original)


@pytest.mark.parametrize("name", ["tp2_ep2", "pp2", "dp2"])
def test_resume_goes_on_from_the_checkpoint(name, runs, tmp_path):
    """To the bit in the same layout, along the same curve in another one."""
    as_after_round_3(runs / "tp2_ep2", tmp_path / "run")
    recipe = small_recipe(tmp_path / "run", LAYOUTS[name])
    run_world(2, train_here, [recipe], True)
    assert resumed_after(tmp_path / "run") == [3]
    ours, theirs = records(tmp_path / "run"), records(runs / "tp2_ep2")
    assert len(ours) == len(theirs)
    if name == "tp2_ep2":
        assert ours == theirs
        assert same_weights(tmp_path / "run", runs / "tp2_ep2")
    for a, b in zip(ours, theirs, strict=True):
        figure = "loss" if a["kind"] == "round" else "accuracy"
        assert a[figure] == pytest.approx(b[figure], rel=1e-4, abs=1e-6)
        assert a.get("lr") == b.get("lr")


def two_rounds(out, layout, budget, *weighting):
    """Eight prompts a round and an evaluation after each, so that every sample is kept."""
    settings = [
        "train.rounds=2",
        "train.warmup_rounds=1",
        "train.prompts_per_round=8",
        f"train.microbatch_tokens={budget}",
        "evaluate.every=1",
        "checkpoint.every=null",
    ]
    names = [f"loss.weighting.{setting}" for setting in weighting]
    return small_recipe(out, layout, *settings, *names)


def sample_weights(run, round_number):
    """The round's weights, NaN past the end of a response: [8, longest]."""
    text = (run / f"samples/round_{round_number:06d}.jsonl").read_text()
    rows = [torch.tensor(json.loads(line)["weight"]) for line in text.splitlines()]
    assert len(rows) == 8
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=torch.nan).double()


def rounds_of(run):
    return [line for line in records(run) if line["kind"] == "round"]


def test_ratio_is_normalised_over_the_whole_step(tmp_path):
    """Whatever the micro-batches and the layout: Z_t is of all the round's responses."""
    runs = {"small": ({}, 64), "large": ({}, 2000), "cp2": ({"cp": 2}, 64), "dp2": ({}, 300)}
    recipes = {
        name: two_rounds(tmp_path / name, *run, "rule=ratio", "alpha=0.3")
        for name, run in runs.items()
    }
    run_world(1, train_here, [recipes["small"], recipes["large"]])
    run_world(2, train_here, [recipes["cp2"], recipes["dp2"]])
    for name in runs:
        for line in rounds_of(tmp_path / name):
            weight_BT = sample_weights(tmp_path / name, line["round"])
            mean_T = weight_BT.nanmean(0)
            assert torch.allclose(mean_T, torch.ones_like(mean_T), atol=1e-5), (name, mean_T)
            assert (weight_BT.nan_to_num(1) - 1).abs().max() > 0.2  # else nothing is tested
            assert line["weight"] == pytest.approx(weight_BT.nanmean().item(), rel=1e-4)
        for ours, theirs in zip(
            rounds_of(tmp_path / name), rounds_of(tmp_path / "small"), strict=True
        ):
            for key in ("loss", "weight", "weight_deciles", "grad_norm"):
                assert ours[key] == pytest.approx(theirs[key], rel=1e-4), (name, key)


def test_schedule_moves_with_the_rounds(tmp_path):
    settings = ("rule=schedule", "start=0.2", "end=0.8", "anneal=linear")
    run_world(1, train_here, [two_rounds(tmp_path / "run", {}, 300, *settings)])
    shares = []
    for line, fifths in zip(rounds_of(tmp_path / "run"), (1, 2.5), strict=True):  # 0.2, then 0.5
        weight_BT = sample_weights(tmp_path / "run", line["round"])
        length_B = (~weight_BT.isnan()).sum(1)
        first = torch.arange(weight_BT.shape[1]) < (length_B * 2 * fifths / 10).ceil()[:, None]
        assert torch.equal(weight_BT.nan_to_num(0) > 0, first)
        assert line["weight"] == pytest.approx(weight_BT.nanmean().item(), rel=1e-6)
        shares.append(line["weight"])
    assert 0.15 < shares[0] < 0.35 < 0.45 < shares[1] < 0.6


VARIANTS = {
    "several steps": ["train.minibatches=2", "train.epochs=2", "loss.clip=0.01"],
    "top-K": ["loss.objective=topk_kl", "loss.topk.k=4", "rollout.top_p=0.95"],
    "ExOPD": ["loss.extrapolation=1.5", "loss.mask_special_tokens=all_but_eos"],
    "masks": ["loss.mask_truncated=true", "loss.mask_special_tokens=all",
              "rollout.max_response_tokens=34"],
}  # fmt: skip


@pytest.fixture(scope="module")
def variants(tmp_path_factory):
    """Every variant of the objective for five rounds, in three layouts."""
    folder = tmp_path_factory.mktemp("variants")
    recipes = {
        layout: [
            small_recipe(folder / name / layout, LAYOUTS[layout], *settings)
            for name, settings in VARIANTS.items()
        ]
        for layout in ("one", "tp2_ep2", "pp2")
    }
    run_world(1, train_here, recipes["one"])
    run_world(2, train_here, recipes["tp2_ep2"] + recipes["pp2"])
    return folder


@pytest.mark.parametrize("layout", ["tp2_ep2", "pp2"])
@pytest.mark.parametrize("name", VARIANTS)
def test_variants_follow_the_same_curve_in_every_layout(name, layout, variants):
    pairs = zip(records(variants / name / layout), records(variants / name / "one"), strict=True)
    for a, b in pairs:
        assert a.keys() == b.keys()
        # A token near the bound of the clip may fall on either side.
        assert_same_figures(a, b, loose={"clipped": 0.02, "clipped_deciles": 0.1})


def test_several_steps_a_round_move_on_from_the_same_old_log_probs(variants, runs):
    ours, theirs = (rounds_of(run)[0] for run in (variants / "several steps/one", runs / "one"))
    assert ours["drift"] < 1e-5  # old log-probs are the ones before the first step
    assert ours["abs_gap"] == pytest.approx(theirs["abs_gap"], rel=1e-4)  # and so are the gaps
    assert theirs["clipped"] == 0 < ours["clipped"]  # in later steps the ratio has left 1
    assert ours["loss_tokens"] == ours["response_tokens"] == theirs["response_tokens"]


def test_the_dense_variant_nears_the_teacher(variants, runs):
    lines = rounds_of(variants / "top-K/one")
    plain = rounds_of(runs / "one")[0]["gap"]
    assert lines[0]["gap"] != pytest.approx(plain, rel=1e-3)  # top_p drew other answers
    assert lines[-1]["topk_kl"] < 0.9 * lines[0]["topk_kl"]
    assert lines[-1]["reverse_kl"] < lines[0]["reverse_kl"]
    assert all(0.9 < line["topk_mass_teacher"] <= 1 for line in lines)
    assert all(line["topk_hit"] <= 1 and line["topk_mass_student"] <= 1 for line in lines)


def test_extrapolation_starts_from_the_plain_loss_times_lambda(variants, runs):
    """At the first step the student is its base: the advantage is lambda times the gap."""
    ours, theirs = (rounds_of(run)[0] for run in (variants / "ExOPD/one", runs / "one"))
    assert ours["loss"] == pytest.approx(1.5 * theirs["loss"], rel=1e-4)
    assert ours["weight"] == pytest.approx(theirs["weight"], rel=1e-5)
    later = [rounds_of(run)[-1]["loss"] for run in (variants / "ExOPD/one", runs / "one")]
    assert later[0] != pytest.approx(1.5 * later[1], rel=1e-2)


def test_masks_leave_out_what_they_name(variants):
    for line in rounds_of(variants / "masks/one"):
        assert 0 < line["truncated"] < 1
        whole = round(16 * (1 - line["truncated"]))  # responses that end, EOS masked in each
        assert line["loss_tokens"] < line["response_tokens"] - whole
    lines = (variants / "masks/one/samples/round_000005.jsonl").read_text().splitlines()
    samples = [json.loads(line) for line in lines]
    cut = [s for s in samples if len(s["tokens"]) == 34 and s["tokens"][-1] != "$"]
    assert cut and all(not any(s["weight"]) and not any(s["gap"]) for s in cut)
    ended = [s for s in samples if s not in cut]
    assert ended and all(s["weight"][-1] == 0 < s["weight"][-2] for s in ended)


def test_a_round_without_a_loss_token_leaves_the_weights_alone(tmp_path):
    """Every response is truncated and masked: said, and no step by momentum or weight decay."""
    settings = ["rollout.max_response_tokens=3", "loss.mask_truncated=true", "train.rounds=3"]
    run = tmp_path / "run"
    process = started("train", RECIPE, *SMALL, *settings, "student.parallel={}", f"out={run}")
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert output.count("every response token is masked; this optimiser step is left out") == 3
    before = HfTensors(ROOT / "recipes/demo/student")
    assert all(torch.equal(tensor, before[name][:]) for name, tensor in weights(run).items())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_resume_finishes(number, runs, tmp_path):
    run = tmp_path / "run"
    recipe = [
        RECIPE,
        *SMALL,
        "student.parallel={}",
        "train.rounds=400",
        f"out={run}",
        "checkpoint.every=null",
    ]
    process = started("train", *recipe)
    deadline = time.monotonic() + 120
    while not (run / "metrics.jsonl").exists() or len(read_metrics(run)) < 3:
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.05)
    process.send_signal(number)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 75, errors
    assert "go on with --resume" in output
    stopped = max(line["round"] for line in read_metrics(run))
    again = started("train", *recipe, f"train.rounds={stopped + 1}", "--resume")
    output, errors = again.communicate(timeout=120)
    assert again.returncode == 0, errors
    assert [line["round"] for line in read_metrics(run) if line["kind"] == "round"] == list(
        range(1, stopped + 2)
    )
    expected = [line for line in records(runs / "one") if line["kind"] == "round"][
        : min(stopped, 5)
    ]
    got = [line for line in records(run) if line["kind"] == "round"][: len(expected)]
    assert got == expected


def test_every_rank_reads_only_its_slices(runs):
    """tp2 ep2: half of what is cut, all of what is not; said once for all arms of a comparison."""
    out = runs / "loaded"
    settings = [
        *SMALL,
        "train.rounds=1",
        "train.warmup_rounds=0",
        "student.parallel={tp: 2, ep: 2}",
    ]
    process = started("compare", RECIPE, *settings, "data.eval=null", "--seeds", 1, "--out", out)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    for role in ("student", "teacher"):
        (line,) = (x for x in output.splitlines() if x.startswith(f"{role}: "))
        least, most, whole = (float(line.split()[i].strip("(")) for i in (1, 3, 8))
        size = (ROOT / f"recipes/demo/{role}/model.safetensors").stat().st_size / 1e6
        assert least == most and 0.5 * size < most + 0.1 and most < 0.6 * size + 0.1
        assert whole == pytest.approx(2 * most, abs=0.11)


def test_an_existing_run_is_not_overwritten(runs):
    process = started("train", RECIPE, *SMALL, f"out={runs / 'one'}")
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "already holds a run" in errors and len(errors.splitlines()) == 1


def test_resume_with_other_settings_is_refused(runs):
    settings = [*SMALL, "student.parallel={}", "train.lr=1e-2", f"out={runs / 'one'}", "--resume"]
    process = started("train", RECIPE, *settings)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "train.lr is 0.01" in errors and len(errors.splitlines()) == 1


def test_a_gate_stops_the_run_before_the_step(tmp_path):
    run = tmp_path / "run"
    settings = [*SMALL, "student.parallel={}", "gates.max_drift=1e-12", f"out={run}"]
    process = started("train", RECIPE, *settings)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 3
    assert errors.startswith("error: engine and trainer log-probs differ")
    assert [line["kind"] for line in read_metrics(run)] == ["eval"]


def test_arms_of_different_layouts_are_refused(tmp_path):
    process = started("compare", RECIPE, "--vary", "student.parallel.tp=1,2", "--out", tmp_path)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 2 and "changes the layout" in errors


def test_a_finished_comparison_can_be_extended(tmp_path):
    settings = [*SMALL, "student.parallel={}", "checkpoint.every=2", "data.eval=null"]
    options = ["--vary", "loss.weighting.rule=iw", "--seeds", 1, "--out", tmp_path]
    for rounds in (2, 4):
        process = started(
            "compare",
            RECIPE,
            *settings,
            "train.warmup_rounds=1",
            f"train.rounds={rounds}",
            *options,
            *(["--resume"] if rounds > 2 else []),
        )
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 0, errors
        lines = read_metrics(tmp_path / "iw" / "seed_1")
        assert [line["round"] for line in lines] == list(range(1, rounds + 1))


def test_compare_writes_summary_and_report(tmp_path):
    out = tmp_path / "comparison"
    settings = [*SMALL, "train.rounds=3", "student.parallel={}", "rollout.max_response_tokens=12"]
    process = started("compare", RECIPE, *settings, "--seeds", 2, "--out", out)
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    arms = json.loads((out / "summary.json").read_text())["arms"]
    assert list(arms) == ["opd", "iw"]
    assert arms["opd"]["seeds"] == arms["iw"]["seeds"] == [1, 2]
    assert arms["opd"]["accuracy_start"] == arms["iw"]["accuracy_start"]
    assert (out / "report.html").stat().st_size > 10_000
    assert "No difference can be told with 2 seeds: IW-OPD ended" in output
    first = [read_metrics(out / arm / "seed_1")[1] for arm in arms]
    assert first[0]["abs_gap"] == first[1]["abs_gap"]  # the arms see the same first answers
    assert first[0]["weight"] == 1.0 < first[1]["weight"]


@pytest.mark.parametrize("eos", ["<eos>", "<unused>"])
def test_fine_tuning_lowers_the_loss(tmp_path, monkeypatch, eos):
    """Also of a folder whose tokenizer ends texts with another id than its configs say."""
    monkeypatch.setattr("iwopd_megatron.toy_task.TEACHER_ROUNDS", 10)
    monkeypatch.setattr("iwopd_megatron.toy_task.STUDENT_ROUNDS", 1)
    write_task(tmp_path / "task")
    settings = tmp_path / "task/teacher/tokenizer_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"eos_token": eos}))
    recipe = load_recipe(
        ROOT / "recipes/demo_teacher.yaml",
        [
            f"student.hf={tmp_path}/task/teacher",
            f"data.train={tmp_path}/task/teacher.jsonl",
            "data.eval=null",
            "train.rounds=10",
            "train.warmup_rounds=1",
            "student.parallel={}",
            f"out={tmp_path}/run",
        ],
    )
    run_world(1, train_here, [recipe])
    losses = [line["loss"] for line in read_metrics(tmp_path / "run")]
    assert losses[-1] < 0.9 * losses[0]
    assert read_hf_config(tmp_path / "run/hf").hidden_size == 96
    assert eos_ids(tmp_path / "run/hf") == ({1} if eos == "<eos>" else {1, 15})


def score(settings, layout, samples, queue):
    parallel = initialise(layout)
    scores, _ = EmbeddedScorer(settings, Packer(parallel, 256), 0.7).score_samples(samples)
    if parallel.is_main:
        queue.put(scores)
    shutdown()


@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("kind", ["moe", "dense"])
def test_teacher_scores_like_transformers(kind, offload, moe_folder, dense_folder):
    """Also a dense teacher in a world that cuts the student's experts."""
    folder = {"moe": moe_folder, "dense": dense_folder}[kind]
    samples = make_samples(512, [20, 37, 11])
    queue = local_context().SimpleQueue()
    settings = Frozen(hf=folder, offload=offload)
    run_world(2, score, settings, Layout(tp=2, ep=2), samples, queue)
    model = hf_model(folder, torch.float32)
    for sample, scores in zip(samples, queue.get(), strict=True):
        ids = torch.tensor([sample.prompt_ids + sample.response_ids])
        with torch.no_grad():
            logp = (model(ids).logits[0] / 0.7).log_softmax(-1)
        start = len(sample.prompt_ids) - 1
        expected = logp[start:-1].gather(-1, ids[0, start + 1 :, None])[:, 0]
        assert torch.allclose(torch.tensor(scores), expected, atol=2e-5)
