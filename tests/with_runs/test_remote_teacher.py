"""Training with teachers behind HTTP: as embedded ones do, whatever happens to the servers."""

import json
import os
import re
import shutil
import signal
import time
from dataclasses import replace

import httpx
import psutil
import pytest
import torch
from same_figures import assert_same_figures
from served import ROOT, TEACHER, served, wait_until
from test_teacher_service import SAMPLES
from transformers import AutoTokenizer
from worlds import run_world

from iwopd_megatron.batch.packing import Packer
from iwopd_megatron.config.load import load_recipe
from iwopd_megatron.files.run_files import read_records
from iwopd_megatron.grading import graders as grading
from iwopd_megatron.grading.graders import CHECKS, GRADERS
from iwopd_megatron.runtime.local_world import local_context, start_local
from iwopd_megatron.runtime.parallel import initialise, shutdown
from iwopd_megatron.teacher.embedded import EmbeddedScorer
from iwopd_megatron.teacher.teachers import Teachers
from iwopd_megatron.train.progress import Progress
from iwopd_megatron.train.supervision import Distillation
from iwopd_megatron.train.trainer import Trainer
from iwopd_megatron.weights.hf_reader import HfTensors

pytestmark = pytest.mark.usefixtures("in_the_repository")
RECIPE = ROOT / "recipes/demo_tiny_moe.yaml"
STUDENT = ROOT / "recipes/demo/student"
SMALL = [
    "train.rounds=3",
    "train.warmup_rounds=1",
    "train.prompts_per_round=8",
    "data.eval=null",
    "train.microbatch_tokens=300",
    "student.parallel={}",
]


def small_recipe(out, *overrides):
    return load_recipe(RECIPE, [*SMALL, f"out={out}", *overrides])


def train_here(recipe):
    parallel = initialise(recipe.student.parallel, recipe.train.seed)
    with Progress(recipe.train.rounds, visible=False) as progress:
        assert Trainer(recipe, parallel, progress).run()
    shutdown()


def weights(run):
    tensors = HfTensors(run / "hf")
    return {name: tensors[name][:] for name in tensors}


SERVICE = "teacher.service={deterministic: true, batch_ms: 100, microbatch_tokens: 128}"


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """A run that starts its own teacher service."""
    out = tmp_path_factory.mktemp("runs") / "undisturbed"
    run_world(1, train_here, small_recipe(out, SERVICE))
    return out


def lines(run):
    return read_records(run / "metrics.jsonl")


def is_near(ours, theirs):
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert a.keys() == b.keys()
        assert_same_figures(a, b)


def test_a_service_teaches_what_an_embedded_teacher_does(undisturbed, tmp_path):
    run_world(1, train_here, small_recipe(tmp_path / "run"))
    is_near(lines(undisturbed), lines(tmp_path / "run"))


def services_of(pid):
    """Processes of `iwopd serve-teacher` under a process: the command, not its ranks."""
    own = []
    for process in psutil.Process(pid).children(recursive=True):
        try:
            if "serve-teacher" in process.cmdline() and os.getpgid(process.pid) == process.pid:
                own.append(process.pid)
        except (psutil.NoSuchProcess, ProcessLookupError):
            pass
    return own


def tokens_in_flight(log):
    urls = re.findall(r"served at (\S+)", log.read_text()) if log.is_file() else []
    try:
        return httpx.get(f"{urls[-1]}/server_info", trust_env=False).json()["tokens_in_flight"]
    except (IndexError, httpx.TransportError):
        return 0


def test_the_teacher_killed_while_it_scores_changes_no_bit(undisturbed, tmp_path):
    """It is started again and asked again; afterwards no process is left."""
    recipe = small_recipe(tmp_path / "run", SERVICE)
    context = start_local(1, train_here, (recipe,))
    log = tmp_path / "run/logs/teacher.log"
    wait_until(lambda: tokens_in_flight(log) > 0 or context.join(timeout=0), 120)
    (service,) = services_of(context.pids()[0])
    os.killpg(service, signal.SIGKILL)
    end = time.monotonic() + 120
    while not context.join(timeout=1):
        assert time.monotonic() < end
    assert log.read_text().count("served at") == 2
    assert lines(tmp_path / "run") == lines(undisturbed)
    ours, theirs = weights(tmp_path / "run"), weights(undisturbed)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)
    assert not any("serve-teacher" in " ".join(p.cmdline()) for p in psutil.Process().children())


def test_a_run_ends_with_one_sentence_when_its_teacher_does_not_start(tmp_path):
    folder = tmp_path / "teacher"
    shutil.copytree(TEACHER, folder)
    recipe = small_recipe(tmp_path / "run", f"teacher.hf={folder}", "teacher.service={}")
    (folder / "model.safetensors").write_bytes(b"\xff" * 100)  # after it was found good
    with pytest.raises(
        Exception, match=r"ServiceError: teacher ended with exit code \d+; the last"
    ):
        run_world(1, train_here, recipe)


def test_urls_are_used_and_no_service_is_started(undisturbed, tmp_path):
    with served(deterministic=True) as service:
        urls = f"teacher.urls=[{service.url}, {service.url}/]"
        run_world(1, train_here, small_recipe(tmp_path / "run", urls))
        assert service.get("/server_info").json()["answered"] == 24
    assert lines(tmp_path / "run") == lines(undisturbed)
    assert not (tmp_path / "run/logs").exists()


def trips(recipe, words, kind="GateError"):
    with pytest.raises(Exception, match=kind) as error:
        run_world(1, train_here, recipe)
    assert words in str(error.value).strip().splitlines()[-1]


def test_a_server_of_another_model_or_template_trips_a_gate(tmp_path):
    other = tmp_path / "other"
    shutil.copytree(TEACHER, other)
    (other / "chat_template.jinja").write_text("{{ messages[0].content }}!")
    with served(folder=other) as service:
        urls = f"teacher.urls=[{service.url}]"
        trips(small_recipe(tmp_path / "a", urls), "is not the student's: chat_template differs")
        free = small_recipe(
            tmp_path / "b", urls, "gates.same_chat_template=false", "train.rounds=2"
        )
        run_world(1, train_here, free)
        urls = [urls, f"teacher.hf={STUDENT}"]
        trips(
            small_recipe(tmp_path / "c", *urls, "gates.same_chat_template=false"),
            "whose config.json is not that of the recipe's teacher",
        )
        another = small_recipe(tmp_path / "d", f"teacher.hf={other}")
        trips(another, "chat templates of", "RecipeError")


def is_near_to(scores, expected):
    for ours, theirs in zip(scores, expected, strict=True):
        assert torch.allclose(torch.tensor(ours), torch.tensor(theirs), atol=2e-5)


def compare_supports(recipe, reference, samples, topk, queue):
    """What `recipe`'s teachers say and what embedded ones of the same models do."""
    parallel = initialise(recipe.student.parallel)
    packer = Packer(parallel, 300)
    teachers = Teachers(recipe, packer, AutoTokenizer.from_pretrained(STUDENT))
    if parallel.is_main:
        for sample in samples[::2]:
            teachers.begin(sample, topk)
    scores, supports = teachers.score_samples(samples, topk)
    expected, expected_supports = EmbeddedScorer(reference, packer, 0.7).score_samples(
        samples, topk
    )
    is_near_to(scores, expected)
    assert len(supports) == len(expected_supports)
    for (ids, logp), (other_ids, other_logp) in zip(supports, expected_supports, strict=True):
        assert ids.shape == other_ids.shape and ids.dtype == other_ids.dtype
        assert torch.allclose(logp, other_logp, atol=1e-4)
        assert (ids == other_ids).float().mean() > 0.99  # near ties
    teachers.close()
    if parallel.is_main:
        queue.put(len(supports))
    shutdown()


def masked_samples():
    masks = {2: [False] * 2, 3: [i % 3 > 0 for i in range(30)]}
    return [replace(s, loss_mask=masks.get(s.index)) for s in SAMPLES]


@pytest.mark.parametrize("layout", ["{pp: 2}", "{cp: 2}", "{tp: 2, ep: 2}", "{}"])
def test_top_k_reaches_the_micro_batches_that_the_student_trains_on(layout, tmp_path):
    with served() as service:
        recipe = small_recipe(
            tmp_path,
            f"student.parallel={layout}",
            "processes=2",
            "rollout.temperature=0.7",
            f"teacher.urls=[{service.url}]",
        )
        queue = local_context().SimpleQueue()
        run_world(2, compare_supports, recipe, recipe.teacher, masked_samples(), 4, queue)
        assert (queue.get() > 0) is ("pp" not in layout)  # rank 0 is no last stage there


def compare_sources(recipe, samples, queue):
    parallel = initialise(recipe.student.parallel)
    packer = Packer(parallel, 300)
    teachers = Teachers(recipe, packer, AutoTokenizer.from_pretrained(STUDENT))
    scores, _ = teachers.score_samples(samples)
    for source, teacher in recipe.teachers.items():
        own = [s for s in samples if s.source == source]
        expected, _ = EmbeddedScorer(teacher, packer, 1.0).score_samples(own)
        for sample, theirs in zip(own, expected, strict=True):
            is_near_to([scores[sample.index]], [theirs])
    teachers.close()
    if parallel.is_main:
        queue.put(scores)
    shutdown()


def by_source(out, math, code, *overrides):
    """Problems of two sources, each with a teacher of its own."""
    rows = [json.loads(line) for line in (ROOT / "recipes/demo/train.jsonl").open()]
    data = out / "train.jsonl"
    text = [json.dumps(row | {"source": ("math", "code")[i % 2]}) for i, row in enumerate(rows)]
    data.write_text("\n".join(text) + "\n")
    return small_recipe(
        out / "run",
        "teacher=null",
        f"data.train={data}",
        f"teachers.math={math}",
        f"teachers.code={code}",
        *overrides,
    )


@pytest.mark.parametrize("kind", ["embedded", "mixed", "remote"])
def test_each_source_has_its_teacher(kind, tmp_path):
    samples = [replace(s, source=("math", "code")[s.index % 2]) for s in masked_samples()]
    with served() as math, served(folder=STUDENT) as code:
        urls = {"embedded": ("", ""), "mixed": ("", code.url), "remote": (math.url, code.url)}[kind]
        models = [
            f"{{hf: {folder}, urls: [{url}]}}"
            for folder, url in zip((TEACHER, STUDENT), urls, strict=True)
        ]
        recipe = by_source(tmp_path, *models)
        queue = local_context().SimpleQueue()
        run_world(1, compare_sources, recipe, samples, queue)
        assert len(queue.get()) == len(samples)


def test_a_run_with_a_teacher_for_each_source(tmp_path, monkeypatch):
    """One embedded, one in a service of the run's own."""
    for source in ("math", "code"):
        monkeypatch.setitem(GRADERS, source, GRADERS["selection_sort"])
        monkeypatch.setattr(grading, "IN_PROCESS", {"math", "code"})
    monkeypatch.delitem(CHECKS, "code")
    service = f"{{hf: {STUDENT}, service: {{}}}}"
    recipe = by_source(tmp_path, f"{{hf: {TEACHER}}}", service)
    run_world(1, train_here, recipe)
    assert len(lines(tmp_path / "run")) == 3
    assert (tmp_path / "run/logs/teachers.code.log").is_file()


def test_problems_without_a_teacher_are_refused(tmp_path, monkeypatch):
    monkeypatch.delitem(CHECKS, "code")
    recipe = by_source(tmp_path, f"{{hf: {TEACHER}}}", f"{{hf: {TEACHER}}}")
    data = tmp_path / "train.jsonl"
    data.write_text(data.read_text() + data.read_text().replace("math", "law"))
    with pytest.raises(Exception, match="problems of source 'law', but .* code, math; add"):
        run_world(1, train_here, recipe)


def test_supervision_begins_what_minibatches_await(undisturbed, tmp_path, monkeypatch):
    """A sample begun as soon as it is there is not scored twice, and the run stays the same."""
    minibatches = Distillation.minibatches

    def begin_first(self, samples, round_number):
        for sample in samples:
            self.begin(sample)
        return minibatches(self, samples, round_number)

    monkeypatch.setattr(Distillation, "minibatches", begin_first)
    with served(deterministic=True) as service:
        run_world(1, train_here, small_recipe(tmp_path / "run", f"teacher.urls=[{service.url}]"))
        assert service.get("/server_info").json()["answered"] == 24
    assert lines(tmp_path / "run") == lines(undisturbed)
